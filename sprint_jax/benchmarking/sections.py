"""The tables of benchmarks/README.md: which files of results they show, and how."""

DIGITS = (
    "accuracy",
    "run | pictures | right | Fréchet | diversity",
    "{name} | {accuracy[overall][count]} | {right} | {distance} | {combined}",
)
# (files, title, command of files that do not name their own, tables of lines with a key: head, row)
SECTIONS = [
    ("results/full.json", "Digits, the full recipe", "", [DIGITS]),
    ("results/quickstart.json", "Digits, the quickstart", "", [DIGITS]),
    ("results/int8.json", "Digits, the full recipe's student in eight bits", "", [DIGITS]),
    (
        "results/control.jsonl",
        "Digits along sketches: a teacher, a student with its branch, a branch on a frozen student "
        "([picture](pictures/control.png))",
        "",
        [
            ("goal", "goal | limit | found", "{goal} | {limit:.3f} | {found:.3f}"),
            ("updates", "training | updates | minutes", "{network} | {updates} | {minutes:.0f}"),
            (
                "sketch",
                "network | steps | sketch | scale | IoU with the prompt's sketch | with the one that was shown "
                "| right",
                "{network} | {steps} | {sketch} | {scale:g} | {iou[iou]:.3f} ± {iou[standard_error]:.3f} "
                "| {followed[iou]:.3f} | {accuracy[accuracy]:.1%} ± {accuracy[standard_error]:.1%}",
            ),
        ],
    ),
    (
        "results/ablation.jsonl",
        "Teachers of four kinds on digits",
        "",
        [
            (
                "arm",
                "times, x | QK norm | `teacher_check` | tangent, bend (limits 1, 0.05) "
                "| tangent norm in distillation | seeds | right in 1, 2, 4 steps",
                "{timestep_scale} | {qk_norm} | {verdict} | {check[tangent]:.2f}, {check[bend]:.3f} "
                "| {tangents[0]:.1f} to {tangents[7]:.1f} | {seeds} | {in_steps}",
            ),
            (
                "fitted",
                "flow loss before | time embedding fitted | fine-tuned | kept | kept, fine-tuned",
                "{base:.3f} | {fitted:.3f} | {fitted, fine-tuned:.3f} | {kept:.3f} | {kept, fine-tuned:.3f}",
            ),
        ],
    ),
    (
        "results/claims.jsonl",
        "The paper's claims on digits, students of one seed beside each other ([picture](pictures/claims.png))",
        "",
        [
            (
                "flow Euler 50",
                "teacher | in 20 steps | as a flow, Euler, 50 | as TrigFlow, Euler, 50",
                "right | {teacher 20[accuracy][0]:.1%} | {flow Euler 50[accuracy][0]:.1%} "
                "| {TrigFlow Euler 50[accuracy][0]:.1%}",
            ),
            (
                "by_steps",
                "students | seeds | right in 1, 2, 4 steps | Fréchet | diversity",
                "{arm} | {seeds} | {in_steps} | {frechet_in_steps} | {diversity_in_steps}",
            ),
            (
                "claim",
                "paper | claim | steps | accuracy, better by | Fréchet, better by | diversity, better by",
                "{source} | {claim} | {steps} | {accuracy_claimed} | {frechet_claimed} | {diversity_claimed}",
            ),
        ],
    ),
    (
        "results/two_modes.jsonl",
        "Two modes: blends between them at one step",
        "",
        [
            (
                "arm",
                "losses | blends | white ones, of half",
                "{arm} | {blends[0]:.1%} ± {blends[1]:.1%} | {white[0]:.1%} ± {white[1]:.1%}",
            )
        ],
    ),
    (
        "results/pruning.jsonl",
        "Depth pruning on digits",
        "",
        [("accuracy", "blocks | right", "{what} {kept} | {accuracy:.1%}")],
    ),
    (
        "results/network.jsonl",
        "The network beside diffusers, float32",
        "",
        [
            (
                "ms",
                "size | workload | ms | eager | compiled | our compilation, s",
                "{size} | {workload} | {ours:.4g} | {over[diffusers]} | {over[diffusers compiled]} "
                "| {cold_s[sprint_jax]:.1f}",
            )
        ],
    ),
    (
        "results/inference.jsonl",
        "Inference beside diffusers, float32",
        "",
        [
            (
                "ms",
                "part | pixels | ms | eager | channels last",
                "{workload} | {image} | {ours:.4g} | {over[diffusers]} | {over[diffusers channels last]}",
            )
        ],
    ),
    (
        "results/savings.jsonl",
        "Savings of inference that change no number",
        "python benchmarks/savings.py",
        [
            (
                "ms",
                "saving | size, channels in and out; tokens | ms | without it | relative error",
                "{what} | {shape} | {ours:.4g} | {over[off]} | {error:.0e}",
            )
        ],
    ),
    (
        "results/train_step.jsonl",
        "One distillation step (a busy machine)",
        "",
        [
            (
                "ms",
                "arm | part of | ms | FLOPs, in student forwards",
                "{arm} | {part_of} | {ms[1]:.4g} | {forwards[0]:.2f}",
            ),
            (
                "separate_over_shared",
                "primal and tangent in one pass | forwards | with a separate jvp | time of the separate jvp",
                "{separate_over_shared} | {forwards_shared[0]:.2f} | {forwards_separate[0]:.2f} | {span}",
            ),
        ],
    ),
    (
        "results/loop.jsonl",
        "The training loop",
        "",
        [
            (
                "ratio",
                "stage | ms a step | over a plain jitted step",
                "{stage} | {ms[sharded][1]:.4g} | {over[sharded]}",
            ),
            ("data_wait", "stage | waiting for data", "{stage} | {data_wait[1]:.1%}"),
        ],
    ),
    (
        "results/depthwise.jsonl",
        "The depthwise convolution",
        "",
        [
            (
                "workload",
                "workload | shape | ms | nine autodiffed shifts | their share alone | grouped convolution",
                "{workload} | {shape} | {ours:.4g} | {over[naive]} | {depthwise_speedup} | {over[grouped]}",
            )
        ],
    ),
    (
        "results/loader.jsonl",
        "The loader, 1024 pixels, bfloat16",
        "python benchmarks/loader.py --seconds 4 [--tokens 100]",
        [
            (
                "tokens",
                "tokens | images/s | a distillation of 0.6B consumes on an H200 | on eight v5e chips",
                "{tokens} | {images_per_second[median]:.0f} | {need[H200][45%]:.0f} at 45 % of peak, "
                "{need[H200][100%]:.0f} at all | {need[v5e host of 8 chips][45%]:.0f}, "
                "{need[v5e host of 8 chips][100%]:.0f}",
            )
        ],
    ),
    (
        "results/serve_load.jsonl",
        "The page's server under load, digits; twice on a machine that was busy with other work",
        "python benchmarks/serve_load.py --model runs/quickstart/student --browser\n"
        "# and for the same student with a control branch of three blocks, not trained",
        [
            (
                "load_before",
                "other work: load average before | cores",
                "{load_before:.1f} | {cores}",
            ),
            (
                "clients",
                "people | change | pictures/s | ms to the answer, median, 95 % | pictures in a call "
                "| wrong answers | server's MiB, early and late",
                "{clients} | {change} | {per_second:.0f} | {ms[median]:.0f}, {ms[p95]:.0f} | {batches:.1f} "
                "| {wrong} | {mib[0]:.0f}, {mib[1]:.0f}",
            ),
            (
                "gain",
                "pictures/s with calls of up to 8 over calls of one, 32 people",
                "{gain[median]:.2f} [{gain[min]:.2f}, {gain[max]:.2f}]",
            ),
            (
                "shown_after",
                "the picture is shown in Chromium after | ms, median, 95 % | pictures",
                "{shown_after} | {ms[median]:.0f}, {ms[p95]:.0f} | {pictures}",
            ),
        ],
    ),
    (
        "results/load_memory.jsonl",
        "Memory and time of loading a transformer",
        "python benchmarks/load_memory.py",
        [
            (
                "dtype",
                "size | dtype | devices | peak over size of the file | s",
                "{size} | {dtype} | {devices} | {peak_per_file:.2f} | {seconds}",
            )
        ],
    ),
    (
        "results/checkpoint_memory.jsonl",
        "Memory of checkpoints (a busy machine)",
        "python benchmarks/checkpoint_memory.py [--gigabytes 4 --devices 1]",
        [
            (
                "mode",
                "mode | devices | bytes of state | peak over state | training waits, s | s",
                "{mode} | {devices} | {state_bytes:.2g} | {peak_per_state:.2f} | {returned_seconds} "
                "| {seconds}",
            )
        ],
    ),
    (
        "plans/*.json",
        "Plans of runs on TPUs and GPUs (compiled, never run; see [docs/planning.md](../docs/planning.md))",
        "python -m sprint_jax.plan --config CONFIG --topology SLICE --sweep batch --out FILE",
        [
            (
                "fits",
                "config | devices | global batch | GiB per device, of | least step, s | MFU at most | bound",
                "[{config}]({file}) | {topology} | {batch}, {chosen} | {gib:.1f} of {limit:.2f} "
                "| {step_seconds:.1f} | {mfu:.0%} | {bound}",
            )
        ],
    ),
    (
        "plans/sample_*.json",
        "Plans of inference on one device (compiled, never run)",
        "python -m sprint_jax.plan --sample --model NAME --topology DEVICE --steps 1 --out FILE",
        [
            (
                "whole",
                "model | device | steps | batch | TFLOP | GB moved | kernels | GiB, one part's weights at once "
                "| least ms | text, transformer, decoder | images/s at most",
                "[{model}]({file}) | {topology} | {steps} | {batch} | {tflop:.3g} | {moved:.3g} "
                "| {whole[kernels]:.0f} | {gib:.1f}, {in_turn:.1f} | {least_ms:.3g} | {of_parts} "
                "| {whole[images_per_second]:.3g}",
            ),
            (
                "largest_batch",
                "model | planned for | most pictures in one step on a card of | one part's weights at once",
                "{model} | {topology} | {most} | {most_in_turn}",
            ),
        ],
    ),
    (
        "plans/scaling.jsonl",
        "One distillation of 1.6B on more chips ([picture](plans/scaling.png))",
        "python benchmarks/scaling.py --config configs/sprint.py:1600m",
        [
            (
                "chips",
                "slice | global batch | GiB per chip | TFLOP per chip | GB over links | arithmetic, s "
                "| links, s",
                "{topology} | {batch} | {gib:.2f} | {tflop:.2f} | {links:.1f} | {compute_seconds:.2f} "
                "| {link_seconds:.2f}",
            )
        ],
    ),
]
