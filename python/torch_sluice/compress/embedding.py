"""What pipeline.py asks to know a weight that is quantised for its bytes; it may ask ``Candidate.for_bytes``."""


class QuantizedEmbedding:
    """Stands for a table that is only looked up."""
