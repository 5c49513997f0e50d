"""From scans to slices and back. X = T1w, Y = T2w; voxel axes i, j, k in RAS; a slice is (H, W)."""
