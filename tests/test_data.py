"""The digits are the real ones, on their own grey levels."""

import numpy as np
import pytest
import torch

from hsivi_fast.data import load_data, to_uint8


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == np.float32 and data.levels == 17
    assert data.images.min() == -1 and data.images.max() == 1
    np.testing.assert_array_equal((data.images[:, 0] + 1) * 8, load_digits().images)
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(np.unique(to_uint8(torch.from_numpy(data.images), 17))) == 17


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="data: 'cifar100'"):
        load_data("cifar100")
