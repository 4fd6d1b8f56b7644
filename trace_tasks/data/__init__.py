"""Where the rows come from. This face names what other packages use of it."""

# ruff: noqa: F401 (they are for others)

from trace_tasks.data.demo import is_demo
from trace_tasks.data.names import (
    CL_BENCHMARK,
    FOLDERS,
    GROUPS,
    JUDGED,
    LIMA,
    ORDERS,
    REASONING,
    REASONING_FOLDER,
    SPLITS,
    SUITES,
    TASKS_PATH,
    expand,
    expand_orders,
    needs_data,
    split_names,
    task_name,
)
from trace_tasks.data.packs import find_cl_benchmark, is_cl_benchmark, read_set
from trace_tasks.data.rows import check_folders, folder_fingerprint, read_rows, read_split, rows_digest
from trace_tasks.data.sources import (
    Data,
    find_all_data,
    find_data,
    find_reasoning,
    general_folder,
    is_reasoning,
    open_data,
    prompts_file,
    source_fingerprint,
)
from trace_tasks.errors import DataError
