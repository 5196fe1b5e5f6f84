"""What an actor says of itself."""

import threading

from distsampler.execution.ray_actor import line_of
from tests.processes import until


def test_the_line_at_which_user_code_waits_is_named_and_not_that_of_the_lock() -> None:
    done, threads = threading.Event(), list[int]()

    def waits_for_a_lock() -> None:
        threads.append(threading.get_ident())
        done.wait()

    thread = threading.Thread(target=waits_for_a_lock)
    thread.start()
    until(lambda: threads and line_of(threads[0]).endswith("in waits_for_a_lock"))
    assert line_of(threads[0]).startswith(f"{__file__}:")
    done.set()
    thread.join()
    assert line_of(threads[0]) == ""
