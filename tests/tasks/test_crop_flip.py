"""Random crop and flip against numpy, one image at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.data import crop_flip

random_crop_flip = jax.jit(crop_flip.random_crop_flip, static_argnames="padding")


def candidates(image, padding):
    """Every crop of the padded image, and its mirror image: {bytes: (top, left, mirrored)}."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            found[crop.tobytes()] = (top, left, False)
            found[crop[:, ::-1].tobytes()] = (top, left, True)
    return found


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(1, 255, (256, 6, 5, 3)).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_image_is_one_of_its_crops_and_all_of_them_occur(images, dtype):
    images = images.astype(dtype)
    out = np.asarray(random_crop_flip(jax.random.key(0), images, padding=1))
    assert out.dtype == dtype
    assert out.shape == images.shape
    seen = [candidates(image, 1)[crop.tobytes()] for image, crop in zip(images, out, strict=True)]
    # 18 possibilities and 256 images: each is expected 14 times, and missing with probability 5e-7.
    assert len(set(seen)) == 18
    assert 90 < sum(mirrored for *_, mirrored in seen) < 166  # 128 ± 4.8 standard deviations


def test_without_padding_it_only_mirrors(images):
    out = np.asarray(random_crop_flip(jax.random.key(1), images, padding=0))
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(images, out, strict=True)])
    np.testing.assert_array_equal(out[mirrored], images[mirrored][:, :, ::-1])
    assert 0 < mirrored.sum() < len(images)


def test_is_the_same_function_in_a_loop_and_under_vmap(images):
    images = images[:8]
    keys = jax.random.split(jax.random.key(2), 3)
    plain = jnp.stack([random_crop_flip(key, images, padding=2) for key in keys])

    @jax.jit
    def looped(images):
        def body(carry):
            i, out = carry
            return i + 1, out.at[i].set(random_crop_flip(keys[i], images, padding=2))

        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, jnp.zeros_like(plain)))[1]

    np.testing.assert_array_equal(looped(images), plain)
    np.testing.assert_array_equal(jax.vmap(lambda key: random_crop_flip(key, images, padding=2))(keys), plain)
    assert not np.array_equal(plain[0], plain[1])
