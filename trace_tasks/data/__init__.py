"""Finds, reads and checks the rows of tasks. This file lists the names that other packages use."""

# ruff: noqa: F401 (other packages import them)

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
