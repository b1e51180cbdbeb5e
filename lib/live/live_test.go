package live

import (
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/plan"
)

func ending(verdict string, at Instant) Rule {
	return Rule{Rule: plan.Rule{Host: "a.example", Ports: []int{443}, Verdict: verdict}, Ends: at}
}

// No clock that stands still or is set makes an allow last, or a deny end early.
func TestOver(t *testing.T) {
	start := Instant{Boot: int64(5 * time.Hour), Wall: time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC).UnixNano()}
	end := start.After(time.Hour)
	at := func(boot, wall time.Duration) Instant {
		return Instant{start.Boot + int64(boot), start.Wall + int64(wall)}
	}
	for _, tt := range []struct {
		name        string
		now         Instant
		allow, deny bool // over
	}{
		{"just before", at(time.Hour-1, time.Hour-1), false, false},
		{"the moment", at(time.Hour, time.Hour), true, true},
		{"wall clock set back by a day", at(time.Hour, -23*time.Hour), true, false},
		{"wall clock set forward by a day", at(time.Minute, 24*time.Hour), true, false},
		{"a virtual host that was paused for two hours", at(time.Minute, 2*time.Hour), true, false},
		{"suspended over the end", at(9*time.Hour, 9*time.Hour), true, true},
	} {
		allow, deny := ending("allow", end), ending("deny", end)
		if got := allow.Over(tt.now); got != tt.allow {
			t.Errorf("%s: the allow is over: %v", tt.name, got)
		}
		if got := deny.Over(tt.now); got != tt.deny {
			t.Errorf("%s: the deny is over: %v", tt.name, got)
		}
	}
	forever := ending("allow", Instant{})
	if forever.Over(at(1000*time.Hour, 1000*time.Hour)) {
		t.Error("a rule without an end is over")
	}
}

func TestWait(t *testing.T) {
	now := Instant{Boot: 1e9, Wall: 2e9}
	if _, some := Wait([]Rule{ending("allow", Instant{})}, now); some {
		t.Error("nothing ends, and is waited for")
	}
	for _, tt := range []struct{ ends, want time.Duration }{
		{time.Hour, watchEvery}, {20 * time.Millisecond, 20 * time.Millisecond}, {-time.Hour, 0},
	} {
		d, some := Wait([]Rule{ending("allow", Instant{}), ending("deny", now.After(tt.ends))}, now)
		if !some || d != tt.want {
			t.Errorf("%s: %s, %v", tt.ends, d, some)
		}
	}
	hold, over := Split([]Rule{ending("allow", now), ending("deny", now.After(1)), ending("allow", Instant{})}, now)
	if len(hold) != 2 || len(over) != 1 || over[0].Verdict != "allow" {
		t.Errorf("%v %v", hold, over)
	}
}

// The two clocks go on together, and at the same pace.
func TestNow(t *testing.T) {
	a := Now()
	time.Sleep(20 * time.Millisecond)
	b := Now()
	boot, wall := time.Duration(b.Boot-a.Boot), time.Duration(b.Wall-a.Wall)
	if a.Boot <= 0 || boot < 20*time.Millisecond || (boot-wall).Abs() > 100*time.Millisecond {
		t.Errorf("%v %v", a, b)
	}
}
