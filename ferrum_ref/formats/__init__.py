"""File formats as containers: what the bytes say, before anybody asks which model they describe."""
