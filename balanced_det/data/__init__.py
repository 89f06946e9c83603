"""Data: class statistics, reading and registering data sets, and a generated long-tailed one."""
