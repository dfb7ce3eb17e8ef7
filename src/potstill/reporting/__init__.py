"""What a run folder holds, as numbers and as one page. Reads run folders and nothing else."""
