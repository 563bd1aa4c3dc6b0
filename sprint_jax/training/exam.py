"""The exam of a student's one-step images, and of the critic that looks at them, by a judge of the data.

Only for data with a judge: `data.feed.Data.readable`. All is of the averaged parameters and held-out records.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import trigflow
from ..core.config import Config
from ..data.feed import Data
from ..losses.adversarial import rank_of_fakes
from ..parallel.sharding import replicated
from . import draws
from .diagnostics import BINS
from .state import Nets, TrainState, trained_of

ANGLES = (*((np.arange(BINS) + 0.5) / BINS * math.pi / 2), trigflow.MAX_TIME)


def make_exam(
    c: Config, nets: Nets, data: Data, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, dict], dict[str, float]] | None:
    """Makes ``exam(state, frozen) -> metrics``, which every process must call; None without a judge.

    Returns:
      'unreadable/t0..t7' and 'unreadable/one_step': shares of the images that the student makes in one step of
      held-out ones noised to the middle of each bin of angles, and to the largest;
      'critic/held_out' and 'critic/readable', if there is a critic: the area under the curve of its logits, of
      real images above one-step ones, and of readable one-step images above unreadable ones (NaN where there
      are none).
    """
    count = c.log.exam
    if data.readable is None or nets.teacher is None or not count:
        return None
    batch, key = data.held_out(count), jax.random.key(c.seed)

    @jax.jit
    def look(state, frozen):
        keys = draws.split(draws.DiscriminatorKeys, key)
        x0, text, mask = draws.images_of(c, jax.tree.map(jnp.asarray, batch))
        guidance = draws.draw_guidance(c, keys.guidance, x0)
        control = draws.control_of(nets, batch)
        student = draws.student_of(nets, c, text, mask, guidance, control=control)
        params, z = draws.whole(nets, frozen, state.ema), draws.draw_noise(c, keys.fake_noise, x0)

        def denoised(angle):
            t = jnp.full(count, angle)
            x_t = trigflow.add_noise(x0, z, t)
            return trigflow.predict_x0(x_t, student(params, x_t / c.sigma_d, t)[0], t, c.sigma_d)

        images = jax.lax.map(denoised, jnp.asarray(ANGLES, jnp.float32))
        logits = {}
        if nets.heads is not None:
            trained, spectral = trained_of(state.disc), state.disc["spectral"]
            network = trained, spectral, state, frozen, text, mask, guidance
            critic = draws.critic_of(nets, c, *network, control=control)
            t = draws.draw_time(c.ladd, keys.real_judged_time, x0, c.sigma_d)
            z = draws.draw_noise(c, keys.real_judged_noise, x0)
            for name, x in (("real", x0), ("fake", images[-1])):
                seen = x if c.ladd.clean else trigflow.add_noise(x, z, t)
                logits[name] = critic(seen / c.sigma_d, t).mean(-1)
        return jax.lax.with_sharding_constraint((images / c.sigma_d, logits), replicated(mesh))

    def exam(state: TrainState, frozen: dict) -> dict[str, float]:
        images, logits = jax.device_get(look(state, frozen))
        pictures = [data.decode(each) for each in images]
        readable = data.readable(np.concatenate(pictures)).reshape(len(images), count)
        names = [*(f"t{i}" for i in range(BINS)), "one_step"]
        shares = zip(names, 1 - readable.mean(1), strict=True)
        found = {f"unreadable/{name}": float(share) for name, share in shares}
        if logits:
            real, fake = logits["real"], logits["fake"]
            found["critic/held_out"] = float(rank_of_fakes(real, fake).mean())
            good, bad = fake[readable[-1]], fake[~readable[-1]]
            both = len(good) and len(bad)
            found["critic/readable"] = float(rank_of_fakes(good, bad).mean()) if both else math.nan
        return found

    return exam
