"""Values of options that entry points share."""

import argparse

import pytest

from domino_jax.run_config import MeshConfig
from domino_jax.runs import options


def test_a_mesh_is_written_as_its_axes():
    assert options.mesh("model=8") == MeshConfig(0, 8)
    assert options.mesh("data=2,model=4") == options.mesh("model=4, data=2") == MeshConfig(2, 4)
    assert options.mesh("data=2") == MeshConfig(2, 1)


@pytest.mark.parametrize(
    "text", ["", "8", "model", "model=x", "model=-1", "fsdp=1", "model=2,model=4", "model=2;data=1"]
)
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no mesh; give model=8, or data=2,model=4"):
        options.mesh(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"mesh.model is 0; it must be 1 or more"):
        options.mesh("model=0")


def test_numbers_are_checked():
    assert options.numbers("16,8") == (16, 8) and options.positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=r"'8,' is not a list of numbers"):
        options.numbers("8,")
    with pytest.raises(argparse.ArgumentTypeError, match=r"0 is not a number of 1 or more"):
        options.positive("0")
