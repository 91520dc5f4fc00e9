"""The dialect that region graphs are written in: one operator in each file. `hydrasurgery.ops` is what users import."""
