"""Where chains run, what their driver decides, and how the progress of a run is shown.

In reading order: ``driver``, the loop that alone commits; ``transition``, its decisions, a pure
function; ``run_state``, the values that these take and give; ``deadlines``, when a place counts as
hung; ``pool``, what a pool must do and may do, and the pool of one process; ``ray_pool``, a pool
whose places are Ray actors; ``ray_actor``, one such actor; ``ray_cluster``, the cluster and its
object store; ``placement``, what an actor asks of a cluster; ``pickling``, whether a recipe can be
sent to other processes; ``progress``, snapshots of a run; ``display``, progress for people;
``metrics``, progress for other programs.
"""
