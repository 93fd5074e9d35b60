"""The sliced convolution is the convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tasks.models import make_model
from tasks.models.convolution import SlicedConv


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(("side", "padding"), [(1, 0), (3, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(8, 8), (7, 5)])
def test_equals_a_convolution(strides, side, padding, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape, 3)), jnp.float32)
    ours = SlicedConv(3, 4, (side, side), strides, padding=padding, rngs=nnx.Rngs(0))
    reference = nnx.Conv(3, 4, (side, side), strides, padding=padding, rngs=nnx.Rngs(1))
    reference.kernel[...] = ours.kernel[...]
    np.testing.assert_allclose(ours(x), reference(x), atol=1e-5)


def test_resnet_with_sliced_convolutions():
    """The same network: the same layers, the same parameters, the same logits."""
    sliced, plain = (
        make_model("resnet8", (8, 8, 1), 3, width=4, stem_stride=2, convolution=which) for which in ("sliced", "xla")
    )
    params, stats = plain.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, sliced.init(jax.random.key(1))[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    logits = [model.apply(params, stats, x, True)[0] for model in (sliced, plain)]
    np.testing.assert_allclose(*logits, atol=1e-5)
