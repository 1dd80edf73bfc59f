"""What a run on a mesh is made of, beside the settings of the model: the mesh, the schedule, who reduces gradients."""

import math
import re
from dataclasses import asdict, dataclass, fields, replace

from torch_sluice.train.errors import TrainError
from torch_sluice.train.settings import Settings

AXES = ("dp", "tp", "pp")  # data, tensor and pipeline parallel
SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zero-bubble")
_STAGES_PER_RANK = {"interleaved": 2, "interleaved-zero-bubble": 2, "zero-bubble": 2}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks.

    Attributes:
        dp, tp, pp: ranks along each axis of the mesh.
        schedule: of the pipeline, one of ``SCHEDULES``.
        data_parallel: "ddp" or "fsdp".
        backend: of the process group, "sluice" or "gloo".
        dense: the dense side instead of Sluice's.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    data_parallel: str = "ddp"
    backend: str = "sluice"
    dense: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def stages(self) -> int:
        """Parts that the layers are cut into."""
        return self.pp * _STAGES_PER_RANK.get(self.schedule, 1) if self.pp > 1 else 1

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule computes the gradients of weights apart from those of activations."""
        return self.pp > 1 and "zero-bubble" in self.schedule

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank of the pipeline; "zero-bubble" goes down the ranks and up again."""
        if self.stages == 2 * self.pp and self.schedule == "zero-bubble":
            return [rank, self.stages - 1 - rank]
        return list(range(rank, self.stages, self.pp))

    def layers_of(self, stage: int, layers: int) -> range:
        """The layers of a stage: as many for each as can be."""
        return range(layers * stage // self.stages, layers * (stage + 1) // self.stages)

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Layout":
        if set(values) != {field.name for field in fields(Layout)}:
            raise TrainError("the checkpoint's mesh is not that of this version of torch-sluice; train anew")
        return Layout(**values)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "dp=1"


def parse_mesh(text: str, **options) -> Layout:
    """``"dp=2,tp=2,pp=2"``, axes that are left out being 1, and the other attributes of a ``Layout``."""
    sizes = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if match is None or match[1] not in AXES or match[1] in sizes or int(match[2]) < 1:
            raise TrainError(
                f"--mesh is '{text}', expected sizes of at least 1 for dp, tp and pp, each once at most: dp=2,tp=2"
            )
        sizes[match[1]] = int(match[2])
    return Layout(**sizes, **{name: value for name, value in options.items() if value is not None})


def fit_micro_batches(settings: Settings, layout: Layout) -> Settings:
    """Settings with as many micro-batches as the mesh needs: a preset has fewer than fill a pipeline."""
    least = layout.dp * layout.stages
    if settings.micro_batches % layout.dp or settings.micro_batches < least:
        settings = replace(
            settings, micro_batches=math.ceil(max(settings.micro_batches, least) / layout.dp) * layout.dp
        )
    return settings


def check_fit(settings: Settings, layout: Layout) -> None:
    """Raises TrainError where the model or the batch can't be divided over the mesh."""
    if settings.heads % layout.tp or settings.feedforward % layout.tp:
        raise TrainError(
            f"--mesh has tp={layout.tp}, expected a divisor of --heads = {settings.heads} and of the feed-forward "
            f"width {settings.feedforward}"
        )
    if settings.layers < layout.stages:
        raise TrainError(
            f"--mesh has pp={layout.pp}, which with --schedule {layout.schedule} makes {layout.stages} stages, "
            f"expected at most --layers = {settings.layers}"
        )
    if settings.micro_batches % layout.dp:
        raise TrainError(
            f"--micro-batches is {settings.micro_batches}, expected a multiple of dp={layout.dp}: each data-parallel "
            "rank takes whole micro-batches"
        )
    if layout.pp > 1 and settings.micro_batches < layout.dp * layout.stages:
        raise TrainError(
            f"--micro-batches is {settings.micro_batches}, expected at least {layout.dp * layout.stages}: for each of "
            f"{layout.dp} pipelines as many as it has stages"
        )
    if layout.splits_backward and layout.data_parallel == "fsdp" and layout.dp > 1:
        raise TrainError(
            f"--data-parallel is fsdp and --schedule is {layout.schedule}, expected ddp: FSDP2 does not see gradients "
            "that are computed apart from the backward pass"
        )
