"""The command, as a user runs it."""

import json

from diht_jax.evaluation.results import write_results
from tests import make


def test_two_tasks_of_a_work_directory(workdir, shared_data, tmp_path):
    output = tmp_path / "new" / "results.json"
    tasks = f"cifar10={shared_data}/cifar10_test.tar,emoji=retrieval:{shared_data}/emoji_google.tar"
    flags = {"model": workdir, "tasks": tasks, "output": output, "limit": 40, "batch_size": 32}
    flags |= {"caption_template": "{caption}"}
    done = make.run_command("diht_jax.evaluate", *flags.items(), devices=2)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert (results["model"], results["step"], results["devices"]) == (str(workdir), 7, 2)
    cifar, emoji = results["results"]
    assert cifar["counts"]["images"] == emoji["counts"]["images"] == 40
    assert emoji["protocol"]["caption_template"] == "{caption}"
    assert len(cifar["protocol"]["templates"]) == 18
    table = done.stdout.splitlines()
    assert table[0] == f"{workdir}, step 7"
    row = next(line.split() for line in table if line.startswith("cifar10"))
    assert row[:3] == ["cifar10", "top-1", f"{100 * cifar['metrics']['top1']:.2f}%"]
    page = (output.parent / "results.html").read_text()
    for result in (cifar, emoji):
        assert f'<section id="{result["task"]}">' in page


def test_compare_needs_no_model(tmp_path):
    for name, top1 in (("a", 0.25), ("b", 0.5)):
        result = {
            "task": "shapes",
            "metrics": {"top1": top1},
            "counts": {"images": 4, "dropped": {}},
            "protocol": {},
        }
        write_results(tmp_path / f"{name}.json", {"model": name, "step": 1, "results": [result]})
    files = f"{tmp_path}/a.json,{tmp_path}/b.json"
    flags = ("compare", files), ("output", tmp_path / "chart.png")
    done = make.run_command("diht_jax.evaluate", *flags)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].split()
    assert row == ["shapes", "top-1", "25.00%", "50.00%", "+25.00"]
    assert (tmp_path / "chart.png").exists()
