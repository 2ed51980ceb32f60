"""Preprocessing of examples/mlp: the formulas, fitted on the training images alone."""

from __future__ import annotations

import io

import pytest
import torch

from mlp.data import Preprocessor

MODES = ("zscore", "minmax", "unit", "none")


def images(seed: int, count: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 251, (count, 4, 5), generator=generator, dtype=torch.uint8)


def reference(mode: str, train: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The formula of each mode, written out in float64."""
    train, x = train.double().flatten(1), x.double().flatten(1)
    if mode == "zscore":
        mean = train.sum() / train.numel()
        return (x - mean) / ((train - mean) ** 2).mean().sqrt()
    if mode == "minmax":
        return (x - train.min()) / (train.max() - train.min())
    if mode == "unit":
        return x / x.norm(dim=1, keepdim=True)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_formula(mode: str, dtype: torch.dtype) -> None:
    train, other = images(1), images(2)
    found = Preprocessor.fit(mode, train)(other, dtype)
    assert found.shape == (50, 20)
    assert found.dtype == dtype
    expected = reference(mode, train, other)
    if mode in ("minmax", "none"):
        # Integers and one division: nothing rounds but what the formula rounds.
        assert torch.equal(found, expected.to(dtype))
    else:
        # The reference rounds its sums, of up to 1000 terms, in other places: a few last bits of
        # float64, and at most the last of float32. Values are of order 1.
        bound = 1e-14 if dtype == torch.float64 else torch.finfo(torch.float32).eps
        assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


def test_zscore_is_exact_where_the_numbers_are() -> None:
    # Mean 6 and standard deviation 2, so that z is -1, 1 and then 123 and -3.
    train = torch.tensor([4, 8, 8, 4], dtype=torch.uint8).reshape(2, 1, 2)
    scale = Preprocessor.fit("zscore", train)
    assert (scale.shift, scale.scale) == (6.0, 2.0)
    assert scale(train).tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    assert scale(torch.tensor([[[252, 0]]], dtype=torch.uint8)).tolist() == [[123.0, -3.0]]


def test_minmax_covers_zero_to_one() -> None:
    train = images(1)
    found = Preprocessor.fit("minmax", train)(train)
    assert (found.min(), found.max()) == (0, 1)


def test_unit_has_norm_one_and_keeps_a_black_image() -> None:
    x = images(1)
    x[7] = 0
    found = Preprocessor.fit("unit", x)(x, torch.float64)
    assert torch.equal(found[7], torch.zeros(20, dtype=torch.float64))
    norms = found[torch.arange(50) != 7].norm(dim=1)
    # Twenty squares, each rounded once, and the quotient before them.
    assert (norms - 1).abs().max() < 1e-14
    assert Preprocessor.fit("unit", x)(torch.tensor([[[3, 4]]], dtype=torch.uint8)).tolist() == [
        pytest.approx([0.6, 0.8], rel=torch.finfo(torch.float32).eps)
    ]


@pytest.mark.parametrize("mode", ["zscore", "minmax"])
def test_constant_training_images_divide_by_one(mode: str) -> None:
    scale = Preprocessor.fit(mode, torch.full((3, 2, 2), 9, dtype=torch.uint8))
    assert scale(torch.tensor([[[9, 14]]], dtype=torch.uint8)).tolist() == [[0.0, 5.0]]


@pytest.mark.parametrize("mode", MODES)
def test_rounded_once(mode: str) -> None:
    train, other = images(1), images(2)
    scale = Preprocessor.fit(mode, train)
    assert torch.equal(scale(other), scale(other, torch.float64).float())


@pytest.mark.parametrize("mode", ["zscore", "minmax"])
def test_fitted_on_what_it_is_given(mode: str) -> None:
    train, validation = images(1), images(2)
    both = torch.cat([train, validation])
    fitted = Preprocessor.fit(mode, both[:50])
    both[50:] = 0
    assert Preprocessor.fit(mode, both[:50]) == fitted
    assert Preprocessor.fit(mode, both) != fitted


def test_statistics_of_many_images_do_not_cancel() -> None:
    # 30 million pixels of 254 and as many of 255: float32 sums would lose the variance.
    train = torch.full((60_000, 25, 40), 254, dtype=torch.uint8)
    train[::2] = 255
    scale = Preprocessor.fit("zscore", train)
    assert (scale.shift, scale.scale) == (254.5, 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_images_are_left_alone(mode: str) -> None:
    x = images(1)
    Preprocessor.fit(mode, x)(x)
    assert torch.equal(x, images(1))


@pytest.mark.parametrize("mode", MODES)
def test_state_survives_a_checkpoint(mode: str) -> None:
    fitted = Preprocessor.fit(mode, images(1))
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    assert Preprocessor.from_state_dict(torch.load(file, weights_only=True)) == fitted


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "other"},
        {"shift": None},
        {"shift": float("nan")},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"scale": "1"},
        {"more": 1.0},
    ],
    ids=str,
)
def test_refuses_another_state(change: dict[str, object]) -> None:
    state = Preprocessor.fit("zscore", images(1)).state_dict()
    with pytest.raises(ValueError, match="not the state of a Preprocessor"):
        Preprocessor.from_state_dict(state | change)


def test_refuses_other_images_and_modes() -> None:
    scale = Preprocessor.fit("none", images(1))
    for wrong in (images(1).float(), images(1).flatten(1)):
        with pytest.raises(ValueError, match=r"expected torch\.uint8"):
            scale(wrong)
        with pytest.raises(ValueError, match=r"expected torch\.uint8"):
            Preprocessor.fit("none", wrong)
    with pytest.raises(ValueError, match="expected at least one"):
        Preprocessor.fit("zscore", images(1)[:0])
    with pytest.raises(ValueError, match="zscore, minmax, unit, none"):
        Preprocessor.fit("other", images(1))
