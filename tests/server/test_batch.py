import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slr_core.errors import DataError
from slr_server.batch import BatchAnswerer, batch_settings, open_output, resume, run_batch, write_line
from tests import tiny
from tests.tiny import PROMPTS

LINES = [
    json.dumps({"id": "a", "prompt": PROMPTS[0], "max_iterations": 2}),
    json.dumps({"prompt": [PROMPTS[0], PROMPTS[1]], "max_new_tokens": 1}),
    "",
    "{torn",
    json.dumps({"prompt": PROMPTS[0], "max_iterations": -1}),
    json.dumps(
        {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "w1", "stream": True}}
    ),
    '{"id": "n", "prompt": "w1", "temperature": NaN}',
    '{"id": "s", "prompt": "\\ud800"}',
    json.dumps({"id": "m", "prompt": "w1", "n": 2, "temperature": 1, "max_new_tokens": 1}),
    json.dumps({"custom_id": "y", "url": "/v1/embeddings", "body": {}}),
    json.dumps({"custom_id": "z", "url": "/v1/completions", "body": {"prompt": "w1", "best_of": "many"}}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "tiny"
    tiny.reasoner().save_pretrained(str(path))
    return str(path)


def answer(source, output, folder):
    count = asyncio.run(run_batch(source, output, batch_settings(model=folder, threads=1, slots=2)))
    return count, [json.loads(line) for line in output.read_text().splitlines()]


def test_formats(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLR_ALLOWED_HOSTS", "example.com")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\ufeff" + "\n".join(LINES))  # the last line has no end
    count, found = answer(source, output, folder)
    assert count == len(found) == len(LINES)
    assert (found[0]["id"], found[0]["iterations"]) == ("a", 2)
    assert len(found[1]["results"]) == 2
    assert [found[i]["error"]["code"] for i in (2, 3)] == ["invalid_json"] * 2
    assert found[4]["error"]["param"] == "max_iterations"
    assert (found[5]["custom_id"], found[5]["response"]["status_code"], found[5]["error"]) == ("x", 200, None)
    assert found[5]["response"]["body"]["choices"][0]["text"] is not None
    assert [found[i]["error"]["code"] for i in (6, 7)] == ["invalid_json"] * 2
    assert (found[8]["id"], len(found[8]["results"])) == ("m", 2)
    assert (found[9]["response"], found[9]["error"]["code"]) == (None, "invalid_request")
    assert found[10]["response"]["status_code"] == 400
    lines = output.read_text().splitlines(keepends=True)
    for count in range(len(lines) + 1):
        output.write_text("".join(lines[:count]))
        assert resume(source, output) == count
    assert answer(source, output, folder)[0] == 0, "all is answered"


def test_resume(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"id": {i}, "prompt": "w1"}}\n' for i in range(3)))
    assert resume(source, output) == 0
    output.write_text('{"id": 0}\n{"id": 1}\n{"id": 2, "te')
    assert resume(source, output) == 2
    assert output.read_text() == '{"id": 0}\n{"id": 1}\n'
    output.write_text('{"id": 5}\n')
    with pytest.raises(DataError, match="answers another request"):
        resume(source, output)
    output.write_text("{}\n" * 4)
    with pytest.raises(DataError, match="more lines"):
        resume(source, output)
    with pytest.raises(DataError, match="cannot read"):
        answer(tmp_path / "gone", tmp_path / "new", None)


def test_files_that_are_no_output(tmp_path):
    """They are refused and left as they are."""
    source, link, other = tmp_path / "in.jsonl", tmp_path / "link", tmp_path / "notes"
    source.write_text('{"prompt": "w1"}')
    link.symlink_to(source)
    other.write_text("[1, 2]")
    for output, message in ((source, "is the input"), (link, "is the input"), (other, "is not an answer")):
        before = output.read_text()
        with pytest.raises(DataError, match=message):
            resume(source, output)
        assert output.read_text() == before
    full = Path("/dev/full")
    with pytest.raises(DataError, match="is not a regular file"):
        resume(source, full)
    with open_output(full) as file, pytest.raises(DataError, match="cannot write /dev/full: No space left"):
        write_line(file, "{}")


@pytest.mark.slow
def test_killed_five_times(folder, tmp_path):
    """Whenever it is killed, every line is answered once, in order."""
    source, output, rng = tmp_path / "in.jsonl", tmp_path / "out.jsonl", random.Random(0)
    lines = [{"id": i, "prompt": PROMPTS[i % len(PROMPTS)], "max_iterations": rng.randint(0, 8),
              "convergence": {"criterion": "fixed"}} for i in range(800)]  # fmt: skip
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "slr_core.cli", "generate", "--model", folder]
    command += ["--input", str(source), "--output", str(output)]
    sizes = [0]
    for _ in range(5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        ends = time.monotonic() + 60
        while (output.stat().st_size if output.exists() else 0) == sizes[-1]:
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        sizes.append(output.stat().st_size)
    assert output.read_text().count("\n") < len(lines), "it was killed before its end"
    subprocess.run(command, check=True, capture_output=True)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in found] == list(range(len(lines)))
    assert [answer["iterations"] for answer in found] == [line["max_iterations"] for line in lines]


def test_id_that_json_cannot_hold():
    for line in ('{"id": 1e400, "prompt": "w1"}', '{"custom_id": -1e400, "url": "/generate", "body": {}}'):
        answer = json.loads(asyncio.run(BatchAnswerer(None, 1).answer(0, line)), parse_constant=pytest.fail)
        assert answer["error"]["code"] == "invalid_json"
