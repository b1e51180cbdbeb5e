package pipelock

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Ports are where a run file has pipelock listen: the proxy, and its metrics.
func Ports(run []byte) (listen, metrics string, err error) {
	c, err := decode(run)
	return c.FetchProxy.Listen, c.Metrics, err
}

// CheckRun holds a run file against what RunYAML makes of a policy. Ports are
// free to differ, and so are addresses of the host that it must not dial;
// everything else has to be the same, byte for byte. The error names the first
// difference.
func CheckRun(run, policy []byte, sentinel, instance string) (RunOptions, error) {
	var o RunOptions
	c, err := decode(run)
	if err != nil {
		return o, err
	}
	planned, err := decode(policy)
	if err != nil {
		return o, err
	}
	o.Sentinel, o.InstanceID = sentinel, instance
	if o.Listen, err = netip.ParseAddrPort(c.FetchProxy.Listen); err != nil {
		return o, fmt.Errorf("fetch_proxy.listen: %w", err)
	}
	if o.MetricsListen, err = netip.ParseAddrPort(c.Metrics); err != nil {
		return o, fmt.Errorf("metrics_listen: %w", err)
	}
	for _, r := range c.Internal {
		if p, err := netip.ParsePrefix(r); err == nil && p.IsSingleIP() && !slices.Contains(planned.Internal, r) {
			o.Own = append(o.Own, p.Addr())
		}
	}
	want, _, err := RunYAML(policy, o)
	if err != nil {
		return o, err
	}
	if string(want) == string(run) {
		return o, nil
	}
	for _, d := range []struct {
		what      string
		got, want []string
	}{
		{"api_allowlist", c.APIAllowlist, planned.APIAllowlist},
		{"blocklist", c.FetchProxy.Monitoring.Blocklist, planned.FetchProxy.Monitoring.Blocklist},
		{"internal", c.Internal, planned.Internal},
	} {
		for _, g := range d.got {
			if !slices.Contains(d.want, g) && d.what != "internal" {
				return o, fmt.Errorf("%s has %s", d.what, g)
			}
		}
		for _, w := range d.want {
			if !slices.Contains(d.got, w) {
				return o, fmt.Errorf("%s lacks %s", d.what, w)
			}
		}
	}
	if err := c.looksLike(planned); err != nil {
		return o, err
	}
	return o, errors.New("it is written in another way")
}

// looksLike names a setting in which a run file differs, apart from its lists.
func (c config) looksLike(p config) error {
	switch {
	case c.Mode != p.Mode || c.Enforce != p.Enforce:
		return fmt.Errorf("mode is %s, enforce %t", c.Mode, c.Enforce)
	case c.DLP != p.DLP:
		return errors.New("dlp is another one")
	case c.RequestBody != p.RequestBody:
		return errors.New("request_body_scanning is another one")
	case c.ForwardProxy != p.ForwardProxy:
		return errors.New("forward_proxy is another one")
	case c.KillSwitch == nil || c.Emit == nil:
		return errors.New("kill_switch or emit is missing")
	}
	return nil
}
