"""The dialect: the operators that every region graph is written in, one a file."""
