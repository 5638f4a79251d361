"""What a processor is given: the rows of a batch, their texts, and their images and videos."""
