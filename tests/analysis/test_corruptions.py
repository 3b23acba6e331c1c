import pytest
import torch

from fastrobust.analysis.corruptions import CORRUPTIONS, corrupt


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 17, 12), (0, 1, 8, 8)])
def test_all_stay_images_of_their_shape_and_leave_random_numbers_alone(name, shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    given, state = images.clone(), torch.get_rng_state()
    found = [corrupt(images, name, severity, seed=1) for severity in (1, 3, 5)]
    assert torch.equal(images, given) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[1], corrupt(images, name, 3, seed=1))
    for image in found:
        assert image.shape == images.shape and image.dtype == images.dtype
        assert ((image >= 0) & (image <= 1)).all()
    if len(images):
        moved = [float((image - images).abs().mean()) for image in found]
        assert 0 < moved[0] < moved[2], moved


def test_what_some_of_them_are():
    x = torch.rand(4, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(corrupt(x, "brightness", 2), (x + 0.2).clamp(max=1))
    torch.testing.assert_close(corrupt(x, "translation", 5), x[..., [7, 8, *range(7)]])
    assert len(corrupt(x, "posterize", 5).unique()) == 2
    flat = torch.full((1, 1, 9, 9), 0.25)
    for name in ("gaussian blur", "motion blur", "pixelate", "contrast", "rotation", "elastic", "translation"):
        torch.testing.assert_close(corrupt(flat, name), flat)
    covered = corrupt(torch.zeros(50, 1, 10, 10), "occlusion", 5)
    assert ((covered == 0.5).sum((1, 2, 3)) == 25).all() and (covered.amax((0, 1)) == 0.5).all()
    noise = corrupt(torch.full((1, 1, 200, 200), 0.5), "impulse noise", 5)
    assert 0.13 < float((noise == 1).float().mean()) < 0.17 and 0.13 < float((noise == 0).float().mean()) < 0.17


def test_bad_arguments():
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="name: got 'snow', expected one of gaussian noise"):
        corrupt(x, "snow")
    with pytest.raises(ValueError, match="severity: got 6, expected 1 to 5"):
        corrupt(x, "fog", 6)
    with pytest.raises(ValueError, match="images: got shape"):
        corrupt(x[0], "fog")
