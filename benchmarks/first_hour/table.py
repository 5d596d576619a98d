"""Formats a run as a table, one row per part, and writes it between two markers of a page."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from diht_jax.storage.files import write_bytes

_GIB = 1 << 30
# Number of characters of an error that a row shows.
_ERROR_CHARS = 120


def fill_page(page: pathlib.Path, device: str, results: dict[str, Any]) -> None:
    """Replaces the text between the markers of a device on a page.

    Raises:
        ValueError: the page lacks the markers.
    """
    begin, end = f"<!-- first_hour {device}: begin -->", f"<!-- first_hour {device}: end -->"
    text = page.read_text("utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page}: expected the lines {begin} and {end}, with the table in between")
    write_bytes(page, f"{before}{begin}\n\n{format_table(results)}\n\n{end}{after}".encode())


def format_table(results: dict[str, Any]) -> str:
    """Returns a paragraph about the machine, and a Markdown table of the parts."""
    parts = results["parts"]
    rows = ["| part | measured | seconds |", "|---|---|--:|"]
    for name, entry in parts.items():
        rows.append(f"| `{name}` | {_cell(_describe(name, entry))} | {entry['secs']:.0f} |")
    return "\n".join([_machine(results), "", *rows])


def _machine(results: dict[str, Any]) -> str:
    machine = results["parts"].get("machine", {})
    devices = f"{machine.get('devices', '?')} x {machine.get('device_kind', '?')}"
    versions = machine.get("versions", {})
    named = ", ".join(f"{name} {versions[name]}" for name in ("jax", "jaxlib") if name in versions)
    small = ", tiny models (`--small`)" if results["small"] else ""
    return f"{devices}{small}; {named or 'versions not known'}; {results['date_utc'][:10]}."


def _describe(name: str, entry: dict[str, Any]) -> str:
    """Describes the measurements of a part in one line."""
    if entry["status"] != "done":
        reason = entry.get("error", "").strip().splitlines() or ["no reason given"]
        return f"{entry['status']}: {reason[-1][:_ERROR_CHARS]}"
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    matching = [prefix for prefix in _LINES if name.startswith(prefix)]
    return _LINES[max(matching, key=len)](entry) if matching else "done"


def _machine_line(entry: dict[str, Any]) -> str:
    accepted, refused = len(entry["flags_accepted"]), entry["flags_refused"]
    text = f"{accepted} of {accepted + len(refused)} compiler flags accepted"
    return f"{text}; refused: {', '.join(refused)}" if refused else text


def _rates_line(entry: dict[str, Any]) -> str:
    fastest: dict[str, float] = {}
    for row in entry["products"]:
        fastest[row["dtype"]] = max(fastest.get(row["dtype"], 0.0), row["flops_per_sec"])
    products = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in fastest.items())
    of_peak = [row["of_peak"] for row in entry["products"] if row["of_peak"]]
    share = f" ({max(of_peak):.0%} of the peak)" if of_peak else ""
    return (
        f"products in TFLOP/s: {products}{share}; copies {_rate(entry['copy_bytes_per_sec'])}, to "
        f"the device {_rate(entry['to_device_bytes_per_sec'])}, to the host "
        f"{_rate(entry['to_host_bytes_per_sec'])}"
    )


def _step_line(entry: dict[str, Any]) -> str:
    micro = f" in micro-batches of {entry['micro_batch']:,}" if entry["micro_batch"] else ""
    text = (
        f"{entry['batch_size']:,} examples{micro}: {_ms(entry['step_secs'])}, "
        f"{entry['images_per_sec']:,.0f} images/s"
    )
    if entry["mfu"] is not None:
        text += f", MFU {entry['mfu']:.1%}"
    if entry["ratio_to_bound"] is not None:
        text += f", {entry['ratio_to_bound']:.2f} times the bound"
    peak = entry["peak_bytes"]
    measured = f"peak {peak / _GIB:.2f} GiB, " if peak is not None else ""
    return f"{text}; {measured}compiled need {entry['compiled_need_bytes'] / _GIB:.2f} GiB"


def _kernels_line(entry: dict[str, Any]) -> str:
    texts = []
    for name, tower in entry["towers"].items():
        ours, xla = tower[f"of_{tower['kernel']}"], tower["of_xla"]
        worst, plain = (max(_numbers(each["difference"])) for each in (ours, xla))
        bits = "the same bits twice" if ours["same_bits_twice"] else "OTHER BITS the second time"
        if tower["kernel"] == "xla":
            texts.append(f"{name}: XLA's {_ms(xla['secs'])}, off by {plain:.1e}, {bits}")
        else:
            texts.append(
                f"{name}: {tower['kernel']} {_ms(ours['secs'])} (XLA {_ms(xla['secs'])}), off by "
                f"{worst:.1e} (XLA {plain:.1e}), {bits}"
            )
    return "; ".join(texts)


def _open_clip_line(entry: dict[str, Any]) -> str:
    speeds = entry["median_images_per_sec"]
    listed = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    text = f"images/s at batch {entry['batch_size']}: {listed}; ratio {entry['ratio']:.2f}"
    failures = "; ".join(f"{name} failed: {why}" for name, why in entry["failures"].items())
    return f"{text}; {failures}" if failures else text


def _loop_line(entry: dict[str, Any]) -> str:
    same = "the same losses" if entry["same_losses"] else (
        f"losses differ by up to {entry['largest_difference']:.1e}"
    )  # fmt: skip
    return (
        f"stopped after step {entry['stopped_at']} of {len(entry['losses'])} with exit status "
        f"{entry['exit_codes'][1]}, resumed: {same}"
    )


def _collectives_line(entry: dict[str, Any]) -> str:
    rows = entry["rows"]
    texts = []
    for name in dict.fromkeys(row["collective"] for row in rows):
        of_kind = [row for row in rows if row["collective"] == name]
        first, last = of_kind[0], of_kind[-1]
        texts.append(f"{name} {_ms(first['secs'])} to {_ms(last['secs'])}")
    smallest, largest = rows[0]["bytes"], rows[-1]["bytes"]
    return f"{entry['devices']} devices, {smallest:,} to {largest:,} bytes: {', '.join(texts)}"


def _losses_line(entry: dict[str, Any]) -> str:
    return "; ".join(
        f"{row['global_batch']:,} pairs: streaming {_ms(row['streaming_secs'])}, gathered "
        f"{_ms(row['gathered_secs'])}"
        for row in entry["rows"]
    )


def _store_line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['bytes'] / 1e9:.2f} GB saved at {_rate(entry['save_bytes_per_sec'])}, restored at "
        f"{_rate(entry['restore_bytes_per_sec'])}, "
        + ("the same bits" if entry["same_bits"] else "OTHER BITS")
    )


def _swag_line(entry: dict[str, Any]) -> str:
    return f"{entry['images_per_sec']:,.0f} images/s ({entry['architecture']}, {entry['dtype']})"


def _spotting_line(entry: dict[str, Any]) -> str:
    return f"{entry['images_per_sec']:,.1f} images/s on {entry['on']}"


# Prefix of a part's name -> function that formats its line.
_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": _machine_line,
    "rates": _rates_line,
    "step_": _step_line,
    "kernels_": _kernels_line,
    "open_clip_": _open_clip_line,
    "loop": _loop_line,
    "collectives": _collectives_line,
    "loss_forms": _losses_line,
    "swag": _swag_line,
    "text_spotting": _spotting_line,
    "store": _store_line,
}


def _numbers(values: dict[str, Any]) -> list[float]:
    """Converts the values of an entry to floats; non-finite ones are stored as names."""
    return [float(value) for value in values.values()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _ms(secs: float) -> str:
    return f"{1e3 * secs:.3g} ms"


def _rate(bytes_per_sec: float) -> str:
    return f"{bytes_per_sec / 1e9:.3g} GB/s"
