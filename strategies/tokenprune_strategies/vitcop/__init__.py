"""ViTCoP: patches by [CLS] attention, merged by clusters at a shallow layer, pruned by key norms at a deep one."""
