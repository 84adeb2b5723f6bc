"""Everything here needs a CUDA device, TensorRT and pycuda; it is skipped, with the reason, where one is missing."""

import pytest

from edgellm.engines.tensorrt.api import TensorRtError, find_api
from edgellm.engines.tensorrt.device import open_cuda


@pytest.fixture(scope="session")
def target() -> str:
    """The device class of the GPU here, such as `sm86`."""
    try:
        find_api()
        cuda, _ = open_cuda()
    except TensorRtError as error:
        pytest.skip(str(error))
    return "sm{}{}".format(*cuda.Device(0).compute_capability())
