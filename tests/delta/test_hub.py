"""To the hub and back, with the hub's own client and a hub in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.delta.stub_hub import TOKEN, Hub
from tests.fit.tiny import backbone

from deltatune.compose.expression import parse
from deltatune.delta.delta import Delta
from deltatune.delta.hub import address, card
from deltatune.errors import UserError
from deltatune.laws.subject import moved

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.shutdown()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    delta = moved(Delta.build(parse("lora(r=2) | bitfit"), backbone(), name="a"))
    delta.record = {
        "task": {"name": "reviews", "kind": "classification", "metric": "accuracy", "labels": ["a", "b"]},
        "metrics": {"dev": {"accuracy": 0.5}, "test": {"accuracy": 0.25}},
        "settings": {"lr": 0.003, "steps": 12},
    }
    delta.save(str(tmp_path / "saved"))
    return tmp_path / "saved"


def run(hub: Hub | None, folder: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the command line with the hub's address in the environment, where its client looks for it at import."""
    code = "import sys; from deltatune.cli import main; sys.exit(main())"
    own = {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_TOKEN": token, "HF_HOME": str(folder / "home")}
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        **own,
        "PYTHONPATH": str(ROOT / "src"),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=folder, timeout=120
    )


def test_what_is_pushed_is_pulled_to_the_byte(hub: Hub, saved: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "push", "saved", "me/reviews", "--private", "--json")
    assert done.returncode == 0, done.stderr
    sha, files = hub.repos["me/reviews"][-1]
    assert json.loads(done.stdout)["address"] == f"me/reviews@{sha}"
    assert hub.private == {"me/reviews"}
    assert sorted(files) == ["README.md", "delta.json", "delta.safetensors"]
    for where in ("me/reviews", f"me/reviews@{sha}"):
        out = f"pulled{len(where)}"
        done = run(hub, tmp_path, "pull", where, "--out", out)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out / "delta.safetensors").read_bytes() == (saved / "delta.safetensors").read_bytes()


def test_an_older_revision_stays_what_it_was(hub: Hub, saved: Path, tmp_path: Path) -> None:
    run(hub, tmp_path, "push", "saved", "me/reviews")
    first = hub.repos["me/reviews"][-1][0]
    moved(Delta.build(parse("ia3"), backbone(), name="b")).save(str(tmp_path / "other"))
    assert run(hub, tmp_path, "push", "other", "me/reviews").returncode == 0
    for where, spec in (("me/reviews", "ia3"), (f"me/reviews@{first}", "lora(r=2) | bitfit")):
        done = run(hub, tmp_path, "pull", where, "--out", f"out-{spec[:3]}", "--json")
        assert json.loads(done.stdout)["delta"] == spec


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        (("push", "saved", "me/reviews"), "hf_wrong", "log in with `hf auth login`"),
        (("push", "saved", "reviews"), TOKEN, "expected user/repo"),
        (("pull", "me/absent", "--out", "out"), TOKEN, "cannot fetch me/absent"),
        (("pull", "me/reviews@nothing", "--out", "out"), TOKEN, "cannot fetch me/reviews@nothing"),
    ],
)
def test_mistakes_are_said_in_one_line(
    words: tuple[str, ...], token: str, said: str, hub: Hub, saved: Path, tmp_path: Path
) -> None:
    hub.repos["me/reviews"] = [("1" * 40, {})]
    done = run(hub, tmp_path, *words, token=token)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_network_it_says_so(saved: Path, tmp_path: Path) -> None:
    done = run(None, tmp_path, "push", "saved", "me/reviews")
    assert done.returncode == 2 and "is there a network?" in done.stderr.splitlines()[-1]


def test_the_card_says_what_it_is_what_it_scores_and_how_it_is_used(saved: Path) -> None:
    text = card(Delta.load(str(saved)), "me/reviews")
    assert text.startswith("---\nlibrary_name: deltatune\ntags: [deltatune, lora, bitfit]\n---\n")
    for part in (
        "# reviews",
        "`lora(r=2) | bitfit`",
        "| test | accuracy | 25.0 |",
        'dt.Delta.load("me/reviews", model)',
        "lr 0.003",
    ):
        assert part in text


@pytest.mark.parametrize("where", ["a", "a/b/c", "a/b@", "http://a/b", "a b/c"])
def test_what_is_no_address_is_refused(where: str) -> None:
    with pytest.raises(UserError, match="expected user/repo"):
        address(where)
