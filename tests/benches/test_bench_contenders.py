"""Each contender computes what it is said to, and a wrong one is not timed."""

import math

import pytest
import torch

from barlow_loss import reference
from bench import present
from contenders import EPS, FFT, JOINT, LAMBD, OURS, PAPER, SOLO, TEXTBOOK, VISSL, build, contenders, entry
from measure import Cell, Errors, check, error_of_own, errors, gram_form, step, truth

CELL = Cell(24, 40)
EAGER = [name for name in contenders() if not entry(name).compiled]


def doubles(cell: Cell = CELL) -> list[torch.Tensor]:
    return [z.detach().double().requires_grad_() for z in cell.views()]


def correlation(u1: torch.Tensor, u2: torch.Tensor) -> torch.Tensor:
    return u1.T @ u2 / u1.shape[0]


def standardized(z: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return (z - of.mean(dim=0)) / (of.var(dim=0, correction=0) + EPS).sqrt()


@pytest.mark.parametrize("name", [name for name in EAGER if entry(name).definition == PAPER])
def test_one_that_computes_the_papers_loss_gives_its_value_and_gradient(name: str) -> None:
    contender = build(name, CELL.d)
    if isinstance(contender, torch.nn.Module):
        contender.double()  # batch norm has buffers
    found = errors(step(contender, *doubles()), truth(*CELL.views()))
    assert found.loss < 1e-12
    assert found.gradient < 1e-11


@pytest.mark.parametrize("name", [name for name in EAGER if entry(name).definition != PAPER])
def test_one_that_computes_another_is_judged_by_its_own(name: str) -> None:
    views, right = CELL.views(), truth(*CELL.views())
    torch.manual_seed(0)
    answer = step(build(name, CELL.d), *views)
    own = error_of_own(name, answer, right, *views)
    assert own.loss < 1e-5
    assert own.gradient < 1e-4
    assert errors(answer, right).gradient > 1e-3


def test_vissl_standardizes_both_views_together() -> None:
    z1, z2 = doubles()
    both = torch.cat([z1, z2])
    c = correlation(standardized(z1, both), standardized(z2, both))
    squares = c.square().sum() - c.diagonal().square().sum()
    expected = (c.diagonal() - 1).square().sum() + LAMBD * squares
    torch.testing.assert_close(build(VISSL, CELL.d)(z1, z2), expected, rtol=1e-12, atol=0)
    assert entry(VISSL).definition == JOINT


def test_the_relaxation_sums_c_along_its_circular_diagonals() -> None:
    z1, z2 = doubles()
    torch.manual_seed(3)
    found = build(FFT, CELL.d)(z1, z2)
    torch.manual_seed(3)
    order = torch.randperm(CELL.d)
    c = correlation(standardized(z1, z1), standardized(z2, z2))
    shuffled = c[order][:, order]
    i = torch.arange(CELL.d)
    sums = torch.stack([shuffled[i, (i + k) % CELL.d].sum() for k in range(1, CELL.d)])
    expected = (c.diagonal() - 1).square().sum() + LAMBD * sums.square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


def test_the_gram_form_is_the_oracle() -> None:
    def oracle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return reference.barlow_twins_loss(a, b, lambd=LAMBD, eps=EPS).loss

    found = errors(step(gram_form, *doubles()), step(oracle, *doubles()))
    assert found.loss < 1e-13
    assert found.gradient < 1e-12


@pytest.mark.parametrize("name", [TEXTBOOK, "barlow_loss"])
def test_a_wrong_answer_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match=rf"{name} at 24×40: expected errors of at most"):
        check(name, CELL, Errors(loss=0.0, gradient=2e-3))
    with pytest.raises(AssertionError, match=rf"{name} at 24×40"):
        check(name, CELL, Errors(loss=math.nan, gradient=0.0))


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*'textbook'.*got 'no such'"):
        build("no such", 8)


def test_who_is_present_where() -> None:
    names = contenders()
    assert present(Cell(256, 4096), names) == names
    assert present(Cell(256, 8192), names) == tuple(name for name in names if name != SOLO)
    assert present(Cell(1024, 8192), names) == (OURS, TEXTBOOK, FFT)
    assert present(Cell(256, 32768), names) == (OURS, FFT)
