"""Studies: runs that differ in one thing at a time, trained, measured and compared as one."""
