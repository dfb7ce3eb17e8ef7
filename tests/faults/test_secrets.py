"""F35: canary secrets are put where users put them; no command, failing or not, lets one out on the screen or into a file."""

from pathlib import Path

import pytest

from command_runs import Server, write_recipe

CANARIES = {
    "HF_TOKEN": "hf_canarycanarycanarycanary", "WANDB_API_KEY": "canary0123456789canary", "MY_SERVICE_SECRET": "canary-secret-canary",
    "POSTGRES_PASSWORD": "canary/pass word",
}  # fmt: skip
SERVER = "teacher={kind: server, url: 'http://127.0.0.1:9', model: m, api_key_env: MY_SERVICE_SECRET, max_outage_seconds: 0.5}"
URL = "https://user:canary-in-url@example.invalid/model"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    write_recipe(folder)
    server = Server(folder)
    yield server
    server.close()


def _commands(folder: Path, run: Path) -> dict[str, tuple[list[str], int]]:
    recipe = str(folder / "recipe.yaml")
    target = f"run.folder={run}"
    token = CANARIES["HF_TOKEN"]
    return {
        "a run": (["distill", recipe, target, "training.steps=2", "training.epochs=null", "--quiet"], 0),
        "a second look": (["check", recipe, target], 0),
        "a URL as a path": (["distill", recipe, target, f"teacher.path={URL}"], 2),
        "a token as a path": (["distill", recipe, target, f"data.train=missing/{token}.jsonl"], 2),
        "a server that is not there": (["distill", recipe, target, SERVER, "objective.support=top_k_tail", "--quiet"], 75),
        "a key in an address": (["check", recipe, target, SERVER.replace("127.0.0.1", f"{token}@127.0.0.1")], 2),
        "an unknown key": (["distill", recipe, target, f"teacher.api_key={token}"], 2),
        "a wrong type": (["check", recipe, target, f"training.steps={token}"], 2),
        "a recipe that is not there": (["distill", f"/nowhere/{token}.yaml"], 2),
        "a model that is not there": (["evaluate", URL, "--data", f"/nowhere/{token}.jsonl", "--format", "text"], 2),
        "an unknown command": ([token], 2),
    }


@pytest.mark.parametrize("name", list(_commands(Path(), Path())))
def test_no_command_lets_a_secret_out(name, server):
    run = server.folder / "runs" / name.replace(" ", "-")
    run.parent.mkdir(exist_ok=True)
    arguments, expected = _commands(server.folder, run)[name]
    status = server.command(run, arguments, environment={**CANARIES, "TRANSFORMERS_VERBOSITY": "debug", "POTSTILL_LOG": "debug"})
    said = server.log(run).read_text()
    assert status == expected, said
    assert said or expected == 0
    assert "canary" not in said
    for path in run.rglob("*"):
        assert path.is_dir() or b"canary" not in path.read_bytes(), path


def test_the_search_finds_a_canary(server):
    """With a secret that no rule knows the same look finds it."""
    run = server.folder / "runs" / "found"
    run.parent.mkdir(exist_ok=True)
    assert server.command(run, ["distill", "/nowhere/canary.yaml"]) == 2
    assert "canary" in server.log(run).read_text()
