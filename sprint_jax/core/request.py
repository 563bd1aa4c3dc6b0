"""The options of drawing pictures, of the pipeline and of the command line."""

import dataclasses
from typing import Any

from .ranges import REQUEST
from .schema import check


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of drawing: of `SprintPipeline`'s call and of the command `sample`.

    Attributes:
      steps: 1 to 4 for a student (default 2); any number for a teacher (default 20).
      guidance: CFG scale; default that of the training's own samples, 4.5 for published models.
      seed: picture i of the result depends on (seed, i) and its prompt, on no other picture.
      height, width: in pixels; default the size of the training pictures.
      images_per_prompt: pictures of one prompt follow each other in the result.
      first: the number of the first picture, to draw a part of a larger request.
      image: to start from instead of noise, one for all or one for each picture of the result; students
        only. See `core.pixels.to_pixels`.
      strength: how much of ``image`` may change, above 0 and at most 1, where it is ignored. See
        `trigflow.image_schedule`.
      control: lines, white on black, that steer a network with a control branch: one image for all or one
        for each picture of the result; None draws without the branch.
      control_scale: how strongly; 1 as the branch was trained, 0 not at all.
      negative: a prompt that a teacher is guided away from.
      binning: draw at the nearest of the sizes that 1024-pixel models were trained on, then scale and
        cut to the size asked for.
      solver: for a teacher, one of `sampling.SOLVERS` (default 'dpm').
      batch_size: at most so many pictures at once. Fewer are filled up to a power of two, so that numbers of
        prompts share programs; and however many are drawn, they are decoded a few megapixels at a time.

    Raises:
      UserError: exit code 2, for a value out of its range in `core.ranges`.
    """

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    first: int = 0
    image: Any = None
    strength: float = 0.6
    control: Any = None
    control_scale: float = 1.0
    negative: str = ""
    binning: bool = False
    solver: str | None = None
    batch_size: int = 64

    def __post_init__(self):
        check(vars(self), REQUEST, "", exit_code=2)
