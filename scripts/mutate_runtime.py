"""Plant faults in the runtime, one at a time, and check that the tests fail.

    python -m scripts.mutate_runtime              # all faults, about an hour on one core
    python -m scripts.mutate_runtime --only 3     # one of them

Every fault is one replacement in a copy of the repository; the tests of the runtime run there until the first
failure. A fault that survives is a hole in the tests: the exit code is then 1. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/unit/test_selection.py",
    "tests/unit/test_masks.py",
    "tests/unit/test_attention_rows.py",
    "tests/unit/test_token_groups.py",
    "tests/unit/test_feature_scorers.py",
    "tests/model/test_scoring.py",
    "tests/model/test_merging.py",
    "tests/model/test_pruned_contract.py",
    "tests/model/test_pruning_exact.py",
    "tests/model/test_families_a.py",
    "tests/model/test_families_b.py",
    "tests/model/test_static_prefill.py",
    "tests/model/test_before_the_decoder.py",
    "tests/model/test_stage_scorers.py",
    "tests/model/test_flops.py",
    "tests/model/test_given_answers.py",
    "tests/model/test_feature_scorers.py",
    "tests/model/test_tower.py",
    "tests/model/test_image_newlines.py",
    "tests/model/test_tower_scorers.py",
)

FIRST = {
    "geometry.py": "tests/model/test_flops.py",
    "pruned.py": "tests/model/test_pruned_contract.py",
    "attention_tap.py": "tests/model/test_pruned_contract.py",
    "session.py": "tests/model/test_pruned_contract.py",
    "schedule.py": "tests/model/test_stage_scorers.py",
    "scoring.py": "tests/model/test_feature_scorers.py",
    "static_prefill/padding.py": "tests/model/test_static_prefill.py",
    "static_prefill/runner.py": "tests/model/test_static_prefill.py",
    "tower/kernel.py": "tests/model/test_tower.py",
    "tower/patch_map.py": "tests/model/test_tower.py",
}
"""The tests most likely to see a fault of a file run first; all others follow."""


@dataclass(frozen=True)
class Fault:
    """One wrong line: what goes wrong, and the replacement that makes it so."""

    name: str
    file: str
    right: str
    wrong: str


FAULTS = (
    Fault(
        "positions compacted",
        "prefill.py",
        "lambda: (gather_positions(value, segment.index, dim), value)",
        "lambda: (value.narrow(dim, 0, segment.width), value)",
    ),
    Fault("no mask when decoding", "decode.py", "if queries == 1 and unmasked:", "if queries == 1:"),
    Fault(
        "the model's own mask when decoding",
        "decode.py",
        'kwargs["attention_mask"] = once(\n            self.made,',
        'kwargs["ignored"] = once(\n            self.made,',
    ),
    Fault(
        "DeepStack lost",
        "prefill.py",
        "hidden = hidden + features.to(hidden.device)",
        "pass",
    ),
    Fault("window ignored", "masks.py", "allowed & (query - key < self.window)", "allowed"),
    Fault(
        "mask not gathered",
        "masks.py",
        "mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))",
        "mask = mask[..., : columns.shape[1]]",
    ),
    Fault(
        "kept tokens in the order of their scores",
        "selection.py",
        "(group * length + position).argsort",
        "(group * length + rank).argsort",
    ),
    Fault("the worst tokens kept", "selection.py", "descending=True", "descending=False"),
    Fault(
        "padding as text query",
        "attention_rows.py",
        "found = valid & ~vision & after_vision",
        "found = ~vision & after_vision",
    ),
    Fault(
        "text before the image as text query",
        "attention_rows.py",
        "found = valid & ~vision & after_vision",
        "found = valid & ~vision",
    ),
    Fault(
        "a given answer as text query",
        "attention_rows.py",
        "found[:, max(vision.shape[1] - answer_length, 0) :] = False",
        "pass",
    ),
    Fault(
        "one cache length for all layers",
        "decode.py",
        'cached, prompt = kwargs["past_key_values"].layers[source], self.prompt',
        'cached, prompt = kwargs["past_key_values"].layers[0], self.prompt',
    ),
    Fault(
        "a merged token not weighted",
        "merging.py",
        "return mask + sizes.log().to(mask.dtype)[:, None, None, :]",
        "return mask",
    ),
    Fault(
        "a merged token weighted by one more",
        "merging.py",
        "total = torch.where(merges, total, kept_sizes.gather(1, target))",
        "total = torch.where(merges, total + 1, kept_sizes.gather(1, target))",
    ),
    Fault(
        "a token merged before counts once",
        "merging.py",
        "share = (sizes * dropped).scatter_add(1, index.gather(1, target), kept_sizes.gather(1, target))",
        "share = dropped.float().scatter_add(1, index.gather(1, target), kept_sizes.gather(1, target).clamp(max=1))",
    ),
    Fault("a hook not removed", "pruned.py", "return hooks\n", "return hooks[1:]\n"),
    Fault(
        "the tap left registered",
        "attention_tap.py",
        "del AttentionMaskInterface._global_mapping[name]",
        "pass",
    ),
    Fault(
        "the kernel not given back", "attention_tap.py", 'text.set_attn_implementation({"": chosen})', "pass"
    ),
    Fault(
        "padding attended to",
        "masks.py",
        "hidden = ~keys_valid[:, None, None, :]",
        "hidden = torch.zeros_like(keys_valid)[:, None, None, :]",
    ),
    Fault(
        "scores of the wrong layer",
        "prefill.py",
        "stage = self.plan.get(layer - 1)",
        "stage = self.plan.get(layer)",
    ),
    Fault(
        "scoring before the decoder fills the cache",
        "scoring.py",
        'run(hidden, *others, **{**kwargs, "past_key_values": None})',
        "run(hidden, *others, **kwargs)",
    ),
    Fault(
        "the last prompt left in a static buffer",
        "static_prefill/padding.py",
        "buffer.narrow(dim, 0, pad).fill_(self.fill)",
        "pass",
    ),
    Fault(
        "counts of the first prompt kept",
        "static_prefill/padding.py",
        "inner.copy_(self.tensor)",
        "inner.copy_(self.tensor if self.along else inner)",
    ),
    Fault(
        "positions counted with the padding",
        "static_prefill/padding.py",
        "return Segment(index - pad, valid, False, sizes)",
        "return Segment(index, valid, False, sizes)",
    ),
    Fault(
        "a graph's memory handed out",
        "static_prefill/runner.py",
        "hidden = output.hidden[:, -prompt.segments[-1].width :].clone()",
        "hidden = output.hidden[:, -prompt.segments[-1].width :]",
    ),
    Fault(
        "padding of a static shape in the cache",
        "static_prefill/runner.py",
        "cache.update(cached.keys[:, :, -width:], cached.values[:, :, -width:], layer)",
        "cache.update(cached.keys[:, :, :width], cached.values[:, :, :width], layer)",
    ),
    Fault(
        "the schedule's scorer at every stage",
        "schedule.py",
        "stage.scorer or self.scorer for stage",
        "self.scorer for stage",
    ),
    Fault(
        "a protected token among those that a rule spreads",
        "scoring.py",
        "vision = vision & ~protected",
        "pass",
    ),
    Fault(
        "scores of two images compared",
        "scoring.py",
        "scores = (rank < tokens.keep[:, None]).float()",
        "pass",
    ),
    Fault(
        "an image's share rounded down",
        "token_groups.py",
        "return share + ((rank < left) & (remainder > 0)).long()",
        "return share",
    ),
    Fault(
        "the vision tower's configuration not given back",
        "tower/kernel.py",
        'vars(module)["config"] = config\n        del ALL_ATTENTION_FUNCTIONS[name]',
        "pass\n        del ALL_ATTENTION_FUNCTIONS[name]",
    ),
    Fault(
        "a patch counted for another token",
        "tower/patch_map.py",
        "members[owned[order], slot] = positions[order]",
        "members[owned[order], slot] = positions",
    ),
    Fault(
        "the farthest chosen token counts",
        "scorers/divprune.py",
        "nearest.minimum(column)",
        "nearest.maximum(column)",
    ),
    Fault("a cache not refused after the with", "session.py", "self._setup.lease.is_open = False", "pass"),
    Fault(
        "all experts counted",
        "geometry.py",
        "total = total * _active_experts(part, config) // own[0].shape[0]",
        "pass",
    ),
)


def survives(fault: Fault) -> tuple[bool, str]:
    """Whether all tests pass with the fault in place, and the first that does not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", "outputs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / "pruning_runtime" / fault.file
        source = path.read_text(encoding="utf-8")
        if source.count(fault.right) != 1:
            raise SystemExit(
                f"{fault.name}: {fault.right!r} occurs {source.count(fault.right)} times in {fault.file}"
            )
        path.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
        tests = sorted(TESTS, key=lambda name: name != FIRST.get(fault.file))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, failed[0] if failed else ""


def main() -> None:
    """Plant each fault, print a table, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, metavar="N", help="plant only the N-th fault (from 1)")
    options = parser.parse_args()
    chosen = FAULTS if options.only is None else (FAULTS[options.only - 1],)
    results = []
    for fault in chosen:
        alive, test = survives(fault)
        results.append({"fault": fault.name, "survives": alive, "first_failure": test})
        print(f"{'SURVIVES' if alive else 'caught':9} {fault.name:42} {test}", flush=True)
    print(json.dumps(results))
    raise SystemExit(any(result["survives"] for result in results))


if __name__ == "__main__":
    main()
