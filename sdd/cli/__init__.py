"""The command line: composition, the loader that checks files, the end of a sweep, the students of a merge."""
