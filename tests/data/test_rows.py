from typing import Any

import numpy as np
import torch

from distsampler.data.kinds import as_rows

ROWS = np.array([4, 0, 4])
X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10)


def test_dicts_and_single_tensors_keep_their_form() -> None:
    batch: Any = as_rows({"x": X, "y": Y}).take(ROWS)
    assert torch.equal(batch["y"], Y[ROWS])
    single: Any = as_rows(X).take(ROWS)
    assert torch.equal(single, X[ROWS])


def test_read_only_memory_is_read_without_a_copy_or_a_warning() -> None:
    rows: Any = as_rows(X.clone())
    array = rows._tree.array
    array.flags.writeable = False
    assert torch.equal(rows.take(ROWS), X[ROWS])
    assert rows._tensors.data_ptr() == array.ctypes.data


def test_other_data_have_another_digest() -> None:
    changed = X.clone()
    changed[9, 2] += 1
    assert as_rows(X).digest() != as_rows(changed).digest()
