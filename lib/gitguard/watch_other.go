//go:build !linux

package gitguard

import (
	"context"
	"time"
)

// scanEvery is how often the workspace is looked at where it can't be watched.
const scanEvery = 2 * time.Second

// Watch looks at the workspace again and again until ctx ends.
func (g *Guard) Watch(ctx context.Context, report func(Finding)) error {
	if g.opts.Mode != "rw" {
		<-ctx.Done()
		return nil
	}
	report, stop := g.covering(report)
	defer stop()
	for {
		if err := g.look(false, nil, report); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(scanEvery):
		}
	}
}
