"""The tasks that come with moeq: one file each, with ``TASK``, or ``TASKS`` where one file offers variants."""
