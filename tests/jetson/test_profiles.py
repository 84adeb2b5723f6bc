"""The profiles hold together: what follows from other fields does."""

import pytest

from edgellm.jetson.profiles import PROFILES


@pytest.mark.parametrize("name", PROFILES)
def test_numbers_are_possible(name: str) -> None:
    profile = PROFILES[name]
    assert profile.device_class == name
    assert 0 < profile.usable_bytes < profile.memory_bytes
    assert 0 < profile.compute_efficiency <= 1
    assert 0 < profile.bandwidth_efficiency <= 1
    assert list(profile.modes) == sorted(profile.modes, key=lambda mode: mode.watts)


def test_peaks_are_those_of_the_data_sheets() -> None:
    peaks = {
        name: [round(mode.half_tflops, 1) for mode in profile.modes]
        for name, profile in PROFILES.items()
        if name.startswith("orin")
    }
    assert peaks == {
        "orin-nx-16gb": [15.0, 19.2],
        "orin-nx-8gb": [12.5, 19.2],
        "orin-nano-8gb": [10.2, 16.7],
        "orin-nano-4gb": [5.1, 8.4],
    }
