//go:build !linux

package reaper

// No engine mounts anything on these systems.

func mountsBelow(string) ([]string, error) { return nil, nil }

func unmountBelow(string) error { return nil }
