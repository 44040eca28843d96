"""Trace readers: what real files hold, and one clear line for what they should not hold."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from ferrum_sim.workload.azure import read_azure
from ferrum_sim.workload.mooncake import read_mooncake
from ferrum_sim.workload.traces import read_trace

from ferrum_ref.errors import FerrumError, FerrumIOError, InvalidFormatError, UnsupportedError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.clause("SI-TRACE-1")
def test_azure_times_are_exact_to_the_tenth_of_a_microsecond(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER + "2023-11-16 23:59:59.9999999,374,44\r\n2023-11-17 00:00:00.0000001,396,109\r\n\r\n"
        "2023-11-17 00:00:01,1,1",
    )
    workload = read_azure(path)
    assert [request.arrival_s for request in workload.requests] == [0.0, 2e-7, 1.0000001]
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in workload.requests] == [(374, 44), (396, 109), (1, 1)]
    assert workload.notes == ()


@pytest.mark.clause("SI-TRACE-1")
def test_azure_columns_may_be_reordered_and_times_carry_an_offset(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufeffGeneratedTokens,Region,TIMESTAMP,ContextTokens\n"
        "7,west,2024-05-10 00:00:00.009930+00:00,9\n8,east,2024-05-10 01:00:01.009930+01:00,10\n",
    )
    requests = read_azure(path).requests
    assert [(r.arrival_s, r.num_prompt_tokens, r.num_output_tokens) for r in requests] == [(0.0, 9, 7), (1.0, 10, 8)]


@pytest.mark.clause("SI-TRACE-1", "SI-WORKLOAD-2")
def test_azure_prompts_share_no_token(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "2023-11-16 00:00:00,30,1\n2023-11-16 00:00:00,20,1\n")
    first, second = read_azure(path).requests
    assert len(first.prompt_token_ids()) == 30
    assert len(second.prompt_token_ids()) == 20
    assert not set(first.prompt_token_ids()) & set(second.prompt_token_ids())


@pytest.mark.clause("SI-TRACE-4")
def test_times_out_of_order_are_sorted_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "2023-11-16 00:00:05,1,1\n2023-11-16 00:00:02,2,1\n2023-11-16 00:00:05,3,1\n")
    workload = read_azure(path)
    assert [(r.index, r.arrival_s, r.num_prompt_tokens) for r in workload.requests] == [(0, 0, 2), (1, 3, 1), (2, 3, 3)]
    assert workload.notes == ("trace.csv: 1 lines are earlier than the line above; sorted by time",)


@pytest.mark.clause("SI-TRACE-2", "SI-WORKLOAD-2")
def test_mooncake_prompts_agree_exactly_as_far_as_their_hash_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 3, 9]}\n'
        '{"timestamp": 1500.5, "input_length": 1024, "output_length": 6, "hash_ids": [7, 3]}\n'
        '{"timestamp": 2000, "input_length": 600, "output_length": 7, "hash_ids": [7, 4]}\n',
        "trace.jsonl",
    )
    first, second, third = (request.prompt_token_ids() for request in read_mooncake(path).requests)
    assert [request.arrival_s for request in read_mooncake(path).requests] == [0.0, 0.5005, 1.0]
    assert first[512 * 2] == 9 * 512
    assert first[512 + 17] == 3 * 512 + 17
    assert len(first) == 1100
    assert first[:1024] == second
    assert first[:512] == third[:512]
    assert not set(first[512:]) & set(third[512:])


@pytest.mark.clause("SI-TRACE-3")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request"),
        (HEADER, "holds no request"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "line 1: got a header without GeneratedTokens"),
        (HEADER + "2023-11-16 00:00:00,1,1\n2023-11-16 00:00:01,1\n", "line 3: got 2 fields"),
        (HEADER + "\n2023-11-16 00:00:00,1,1\nyesterday,1,1\n", "line 4: got TIMESTAMP 'yesterday'"),
        (HEADER + "2023-13-16 00:00:00,1,1\n", "line 2: got TIMESTAMP '2023-13-16 00:00:00'"),
        (HEADER + "2023-11-16 00:00:00,many,1\n", "line 2: got ContextTokens 'many'"),
        (HEADER + "2023-11-16 00:00:00,1,0\n", "line 2: got GeneratedTokens '0'"),
        (HEADER + "2023-11-16 00:00:00,1,-4\n", "line 2: got GeneratedTokens '-4'"),
        (HEADER + "2023-11-16 00:00:00,99999999999999999999,4\n", "line 2: got ContextTokens"),
        (HEADER + "2023-11-16 00:00:00,1.5,4\n", "line 2: got ContextTokens '1.5'"),
    ],
)
def test_a_malformed_azure_line_is_named_with_file_and_number(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidFormatError) as caught:
        read_azure(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.clause("SI-TRACE-3")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: got text that is not JSON"),
        ("[1]", "line 2: got list"),
        ("[" * 100_000, "line 2: got text that is not JSON"),
        ('{"timestamp": 1}', "line 2: got an object without input_length, output_length, hash_ids"),
        ('{"timestamp": "x", "input_length": 1, "output_length": 1, "hash_ids": [1]}', "line 2: got timestamp 'x'"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "line 2: got timestamp -1"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "line 2: got timestamp nan"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}', "line 2: got input_length 0"),
        (
            '{"timestamp": 1, "input_length": true, "output_length": 1, "hash_ids": [1]}',
            "line 2: got input_length True",
        ),
        ('{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "line 2: got 1 hash_ids"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": 3}', "line 2: got hash_ids that are no"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [-3]}', "line 2: got hash_ids[0] -3"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [8388608]}', "line 2: got hash_ids[0]"),
    ],
)
def test_a_malformed_mooncake_line_is_named_with_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    good = '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [3]}\n'
    path = write(tmp_path, good + line + "\n", "trace.jsonl")
    with pytest.raises(InvalidFormatError) as caught:
        read_mooncake(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.clause("SI-TRACE-3")
def test_files_that_are_no_text_traces_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "trace.csv"
    binary.write_bytes(HEADER.encode() + b"\xff\xfe\x00\x01\n")
    with pytest.raises(InvalidFormatError, match="UTF-8"):
        read_trace(binary)
    with pytest.raises(FerrumIOError, match="nowhere"):
        read_trace(tmp_path / "nowhere.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FerrumIOError, match="folder"):
        read_trace(tmp_path / "folder.csv")
    with pytest.raises(UnsupportedError, match=r"\.txt"):
        read_trace(tmp_path / "trace.txt")


@pytest.mark.clause("SI-TRACE-3")
def test_no_prefix_of_a_file_escapes_as_another_error(tmp_path: Path) -> None:
    text = HEADER + "2023-11-16 00:00:00.5,12,34\n2023-11-16 00:00:01.5,56,78\n"
    for length in range(len(text)):
        path = write(tmp_path, text[:length])
        with contextlib.suppress(FerrumError):
            read_azure(path)


@pytest.mark.clause("SI-TRACE-5")
def test_a_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "2023-11-16 00:00:00,1,1\n2023-11-16 00:00:01,2,1\nbroken\n")
    assert len(read_trace(path, 2).requests) == 2
    with pytest.raises(InvalidFormatError, match="line 4"):
        read_trace(path, 3)


@pytest.mark.clause("SI-TRACE-1")
def test_the_recorded_azure_traces_are_read_as_they_are(trace_data: Path) -> None:
    """Counts and sums from `wc -l` and `awk` over the files."""
    workload = read_trace(trace_data / "azure_llm_2023_conv.csv")
    assert (len(workload.requests), workload.num_prompt_tokens, workload.num_output_tokens) == (
        19366,
        22361870,
        4088665,
    )
    code = read_trace(trace_data / "azure_llm_2023_code.csv")
    assert (len(code.requests), code.num_prompt_tokens, code.num_output_tokens) == (8819, 18059974, 245896)


@pytest.mark.clause("SI-TRACE-2")
def test_the_recorded_mooncake_trace_is_read_as_it_is(trace_data: Path) -> None:
    workload = read_trace(trace_data / "mooncake_conversation.jsonl", limit=2000)
    assert len(workload.requests) == 2000
    first, second = (request.prompt_token_ids() for request in workload.requests[:2])
    assert (len(first), len(second)) == (6758, 7322)
    assert first[:512] == second[:512]
    assert first[512] != second[512]
