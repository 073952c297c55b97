"""Files of rows, read strictly: JSONL, CSV, Parquet, and what `datasets` saved.

    for record in open_rows(local_path("questions.csv")).records():
        print(record.where, record.values or record.fault)

A row that cannot be read is a record with a fault; a file whose structure cannot be trusted raises
`BrokenFile`. What a row has to hold is the business of whoever reads it.
"""
