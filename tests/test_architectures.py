"""A sample of `benchmarks/architectures.py`: networks of many kinds go through whole."""

import pytest
from architectures import measured

# random depthwise convs and the like are not among them: see the columns "8 bits" and "float" there
SAMPLE = (
    "DLRM", "FNO", "LSTM cells", "TCN", "U-Net 3-D", "torch Transformer", "transformers Deberta",
    "transformers Mamba",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_goes_through(name, kernels_are_exact):
    """Compressed to 15 % of its bytes, written, read to the bit, exported, run in two runtimes."""
    row = measured(name, "bits only")
    assert "stopped" not in row, row["stopped"]
    assert row["bytes %"] <= 15
    assert row["left %"] <= 4  # vectors, which are more of a network the smaller it is
    assert row["read back"] == "same"
    if kernels_are_exact:  # elsewhere the integer kernels of both runtimes saturate
        assert row["OpenVINO error %"] < 3
        assert row["ONNX error %"] < 3
