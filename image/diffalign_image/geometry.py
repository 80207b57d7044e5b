"""How an update of P prompts x G images is spread over processes and memory; what is learned does not depend on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil


@dataclass(frozen=True)
class Geometry:
    """What one update does. `rows` are gradient rows: images x trained steps, or x draws of a matching loss.

    block_prompts: prompts drawn together, while the rewards of the block before are measured.
    """

    processes: int
    prompts: int
    images_per_prompt: int
    images: int
    prompts_per_process: int
    block_prompts: int
    blocks_per_process: int
    rows_per_image: int
    optimizer_steps: int
    rows_per_step: int
    microbatches_per_step: int

    def __str__(self) -> str:
        """One line for people."""
        return (f"{self.prompts} prompts x {self.images_per_prompt} images = {self.images} images an update, on "
                f"{self.processes} process{'es' if self.processes > 1 else ''}: {self.blocks_per_process} blocks of "
                f"{self.block_prompts} prompts each, then {self.optimizer_steps} optimizer steps of "
                f"{self.rows_per_step} rows ({self.rows_per_image} an image) in {self.microbatches_per_step} "
                "microbatches a process")

    def as_dict(self) -> dict[str, int]:
        """For geometry.json."""
        return asdict(self)


def solve(*, prompts: int, images_per_prompt: int, processes: int, batch_rows: int, microbatch_rows: int,
          rows_per_image: int, epochs: int, minibatches: int) -> Geometry:
    """The geometry that the settings give: memory is bounded by batch_rows images and microbatch_rows gradient rows.

    Raises: ValueError if the processes cannot share the prompts evenly, naming the nearest numbers that they can.
    """
    if prompts % processes:
        near = [n for n in (prompts // processes * processes, ceil(prompts / processes) * processes) if n]
        raise ValueError(f"prompts_per_update={prompts} must be a multiple of the {processes} processes; the nearest "
                         f"is {' or '.join(map(str, near))}")
    share = prompts // processes
    block = min(share, max(1, batch_rows // images_per_prompt))
    images = prompts * images_per_prompt
    rows = ceil(images * rows_per_image / minibatches)
    return Geometry(processes, prompts, images_per_prompt, images, share, block, ceil(share / block), rows_per_image,
                    epochs * minibatches, rows, ceil(ceil(rows / processes) / microbatch_rows))
