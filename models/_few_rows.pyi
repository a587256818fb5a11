# Addresses and sizes; see models/few_rows.py.

SUPPORTED: str
ROWS_MAX: int

def multiply_float32(
    weight: int, x: int, bias: int, y: int, rows: int, inputs: int, outputs: int, threads: int, /
) -> None: ...
def multiply_bfloat16(
    weight: int, x: int, bias: int, y: int, rows: int, inputs: int, outputs: int, threads: int, /
) -> None: ...
def multiply_int8(
    weight: int,
    scale: int,
    offset: int,
    x: int,
    levels: int,
    y: int,
    rows: int,
    inputs: int,
    outputs: int,
    threads: int,
    /,
) -> None: ...
