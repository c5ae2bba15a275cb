"""What runs on the other side of the wall: the process that builds it, and the harness of untrusted programs.

These modules import the standard library alone, by relative imports, because the jail has no RealFlow in it:
they run as `python -m inside.jail` and `python -m inside.candidate`, with this folder's parent on the path.
"""
