"""VisPruner and FasterVLM: tokens that [CLS] attends to, and distinct ones of the others."""
