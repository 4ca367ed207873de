"""The Dagster code location: what runs when, on which day.

The platform file    platform, platform_parts, platform_names: what it says; platform_checks, platform_file: read; home: the
                     registered ones
The lake             warehouse, tables
A day                sources: read; intake, snapshots: its bad rows; ranker: scores, where the log has none; history: features
                     of earlier days; join: examples; contract: what features they should have; windows: whether they are all
                     there; faults: what refuses a day
Models               model_store
Experiments          contenders: who is compared, and how trained; training_pool: trained; training_record: what is kept;
                     improvement, intervals, calibration_table, domain_shift: compared; tuning, trial_record: the search;
                     results: written down; study: all of it, from logs to document
Dagster              assets, automation, definitions; runs, processes: those that died; pictures, markdown: plots and tables
The command `mtmd`   cli, in_process, scoreboard, shell, web
"""

import os

# A thread of torch's that waits for another spins, by default so long that training is many times slower where
# others use the machine. This long costs nothing on a quiet one. Read when torch is imported, which is later.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
