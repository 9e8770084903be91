"""Progress and results for experiment trackers: TensorBoard and MLflow.

Neither is imported here: the writer of the one and the module of the other are passed in.
"""

from typing import Any

from rabbet.core.cost import Cost
from rabbet.jobs import Progress


def to_tensorboard(writer: Any) -> Progress:
    """A `Jobs(progress=...)` that writes a scalar for each stage: the share that is done.

    writer: a `torch.utils.tensorboard.SummaryWriter`.
    """

    def report(stage: str, done: int, total: int) -> None:
        writer.add_scalar(f"progress/{stage.partition(': ')[0]}", done / max(total, 1), done)

    return report


def to_mlflow(mlflow: Any) -> Progress:
    """A `Jobs(progress=...)` that logs a metric for each stage to the active run: the share done.

    mlflow: the module.
    """

    def report(stage: str, done: int, total: int) -> None:
        name = stage.partition(": ")[0].replace(" ", "_")
        mlflow.log_metric(f"progress.{name}", done / max(total, 1), step=done)

    return report


def metrics_of(cost: Cost, whole: Cost) -> dict[str, float]:
    """The metrics of a result by name, for `mlflow.log_metrics` and the like.

    Bytes, MACs, BOPs and bits a weight, the latency in milliseconds if it was measured, and all but
    the bits as shares of the float32 network.
    """
    amounts: dict[str, float] = {"bytes": cost.bytes, "macs": cost.macs, "bops": cost.bops}
    base: dict[str, float] = {"bytes": whole.bytes, "macs": whole.macs, "bops": whole.bops}
    if whole.time:
        amounts["latency"], base["latency"] = cost.time / 1e6, whole.time / 1e6
    shares = {f"{name}.share": amount / (base[name] or 1) for name, amount in amounts.items()}
    return {**amounts, **shares, "bits": cost.bits}
