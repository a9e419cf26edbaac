"""The cases of the kernel benches, one file per family of ops; see cases.py."""
