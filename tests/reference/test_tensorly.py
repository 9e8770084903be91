"""Factorisation against tensorly: the same problem, the same sweeps, the same errors."""

import pytest
import tensorly
import torch
from networks import rand
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac

from rabbet.solve.als import CPProblem, als, khatri_rao, random_start


@pytest.fixture(autouse=True)
def _backend():
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend(before)


@pytest.mark.parametrize("shape", [(8, 6, 9), (5, 12, 4), (7, 6, 3, 2)])
def test_mttkrp_is_tensorlys(shape):
    tensor = rand(*shape).double()
    factors = random_start(shape, 4)
    problem = CPProblem(tensor)
    for mode in range(len(shape)):
        _, right, _ = problem.sides(factors, mode)
        wanted = tensorly.tenalg.unfolding_dot_khatri_rao(
            tensor, (torch.ones(4).double(), list(factors)), mode
        )
        assert torch.allclose(right, wanted)


def test_khatri_rao_is_tensorlys():
    factors = random_start((3, 4, 5), 2)
    assert torch.allclose(khatri_rao(factors), tensorly.tenalg.khatri_rao(list(factors)))


@pytest.mark.parametrize("shape", [(8, 6, 9), (12, 10, 3)])
def test_alternating_least_squares_goes_where_tensorlys_goes(shape):
    tensor = rand(*shape).double()
    start = random_start(shape, 5)
    given = CPTensor((torch.ones(5, dtype=torch.float64), [f.clone() for f in start]))
    theirs = parafac(tensor, 5, n_iter_max=25, init=given, tol=0)
    wanted = float((tensorly.cp_to_tensor(theirs) - tensor).norm() / tensor.norm())
    ours = als(CPProblem(tensor), start, 25, 0.0)
    assert ours.error == pytest.approx(wanted, rel=1e-4)
    assert ours.steps == 25
    assert not ours.stalled
