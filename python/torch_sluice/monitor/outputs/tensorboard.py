"""TensorBoard scalars."""

from pathlib import Path


class TensorBoard:
    """Writes the figures of a step as one event, from a thread of TensorBoard's own.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    def __init__(self, folder: str | Path):
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import FileWriter
        except ImportError as error:
            raise ImportError(
                f"log_dir is {str(folder)!r}, which needs TensorBoard: pip install tensorboard"
            ) from error
        self._summary = Summary
        self._writer = FileWriter(str(folder))

    def write(self, step: int, figures: dict[str, float]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in figures.items()
            if isinstance(value, (int, float))
        ]
        self._writer.add_summary(self._summary(value=values), step)

    def close(self) -> None:
        self._writer.close()
