"""What is run from the root of a checkout; nothing here is part of the package.

The commands are the files without a suffix. Behind them: ``benchmarks`` (how fast, how right each
sampler is), ``certificate`` (the table of bars), ``cluster`` (the files of cluster/ checked, a
cluster simulated), ``examples`` (programs to copy from) and ``figures``. A script's own arithmetic
is tested beside it, in ``test_*.py``; ``tests/scripts`` runs the commands from outside.
"""
