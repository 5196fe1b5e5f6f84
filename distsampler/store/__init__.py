"""The run directory: one driver writes it, anybody reads it, with numpy and zarr alone.

In reading order: ``manifest``, run.json, what a run is and how far it is; ``reader``, the one way
to open and to read a run directory; ``trace``, the driver's: it makes, commits, repairs and seals;
``constants``, what is known before the first draw; ``zarr_arrays``, the draws; ``large_arrays``,
what is too large to travel to the driver; ``zarr_files``, zarr over files, and the one search for
damage; ``integrity``, how what is read is parsed, checked and shown; ``chain_states``, from which
chains continue; ``events``, what happened; ``lease``, one driver a run; ``files``, written whole or
not at all, in one of ``folders``, local or remote.
"""
